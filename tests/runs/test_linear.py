"""Runs of job.linear: a reference implementation, any number of workers, resuming, errors."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import models, transforms

from runs import FLIP, check_steps, contents, differences, errors_of, of_kind, records
from job.config import LinearConfig, read_config
from job.evaluate.classifier import different
from job.cluster import comm
from job.data import randomness
from job.data.digits import write_digits
from job.networks import build_resnet
from job.frameworks.moco import build_moco

# 131: two full batches of validation and 3 images, so workers get different numbers
TRAIN, VAL, CLASSES = 90, 131, 6
SMALL = "--image-size 32 --batch-size 12 --epochs 3 --schedule 2 --lr 0.3 -j 0".split()
STEPS = TRAIN // 12


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Images of six classes that differ in colour, with noise. The last is undecodable."""
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(1)
    for split, number in (("train", TRAIN), ("val", VAL)):
        for index in range(number):
            path = folder / split / f"class{index % CLASSES}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 140, (36, 40, 3))
            pixels[:, :, index % 3] += 35 * (1 + index % CLASSES // 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    path.write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of `job.train` with random weights and statistics."""
    torch.manual_seed(7)
    net = build_resnet("resnet18", mlp=True)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("pretrained") / "last.pth.tar"
    state = {f"module.encoder_q.{name}": value for name, value in net.state_dict().items()}
    content = {"epoch": 3, "step": 0, "arch": "resnet18", "state_dict": state}
    torch.save(content | {"config": {"image_size": 48}, "format": 1}, path)
    return path


@pytest.fixture(scope="module")
def trained(start_job, labelled, pretrained, tmp_path_factory):
    """Folder and output of an uninterrupted run of two workers."""
    folder = tmp_path_factory.mktemp("linear") / "run"
    options = [labelled, *SMALL, "--pretrained", pretrained, "--keep", 9, "--tensorboard"]
    job = start_job(2, folder, options, "job.linear")
    output = job.finish()
    assert job.process.returncode == 0, output
    return folder, output


def load(path):
    return torch.load(path, weights_only=True)


def linear(*arguments):
    """Run one worker without a launcher."""
    command = [sys.executable, "-m", "job.linear", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def validated(output):
    """Return the accuracies in a run's output."""
    return re.findall(r"validation on .*", output)


@pytest.mark.short
def test_run_learns_and_validates_each_epoch(trained, labelled):
    folder, output = trained
    epochs = of_kind(folder, "validation")
    assert [record["epoch"] for record in epochs] == [0, 1, 2]
    assert [record["val_images"] for record in epochs] == [VAL - 1] * 3
    assert len(validated(output)) == 3
    assert len(of_kind(folder, "undecodable")) == 1
    assert epochs[-1]["val_top1"] > 2 * 100 / CLASSES
    assert all(record["val_top1"] < record["val_top5"] <= 100 for record in epochs)
    assert [record["steps"] for record in of_kind(folder, "step")] == list(range(1, 3 * STEPS + 1))
    assert "the frozen network is unchanged to the bit" in output


def test_options_in_the_log_are_a_command_line_of_the_run(trained):
    folder, output = trained
    [shown] = re.findall(r"options: (.*) \(with the defaults: ", output)
    again = dataclasses.asdict(read_config(shlex.split(shown), kind=LinearConfig))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: again[name] for name in saved} == saved


@pytest.mark.short
def test_tensorboard_has_the_records(trained):
    folder, _ = trained
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    of_validation = of_kind(folder, "validation")
    for name in ("val_loss", "val_top1", "val_top5"):
        events = [(event.step, event.value) for event in shown.Scalars(f"validation/{name}")]
        assert events == [
            (record["steps"] - 1, pytest.approx(record[name])) for record in of_validation
        ]
    last = [record for record in of_kind(folder, "step") if record["step"] == STEPS - 1]
    events = [(event.step, event.value) for event in shown.Scalars("steps/top1")]
    assert events == [(record["steps"] - 1, pytest.approx(record["top1"])) for record in last]


@pytest.mark.short
def test_classifier_only_is_trained(trained, pretrained):
    before = {
        name.removeprefix("module.encoder_q."): value
        for name, value in load(pretrained)["state_dict"].items()
    }
    after = {
        name.removeprefix("module."): value
        for name, value in load(trained[0] / "last.pth.tar")["state_dict"].items()
    }
    body = {name: value for name, value in before.items() if not name.startswith("fc.")}
    assert after.keys() - body.keys() == {"fc.weight", "fc.bias"}
    assert different(after, body) == ""
    assert after["fc.weight"].abs().max() > 0.1


@pytest.mark.short
def test_best_checkpoint_is_of_the_best_epoch(trained):
    folder, _ = trained
    accuracies = {
        record["epoch"] + 1: record["val_top1"] for record in of_kind(folder, "validation")
    }
    best = load(folder / "best.pth.tar")
    assert best["best_acc1"] == accuracies[best["epoch"]] == max(accuracies.values())
    assert load(folder / "last.pth.tar")["epoch"] == 3


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    write_digits(str(folder))
    return folder


def reference_accuracy(data, pretrained, epochs, batch, rate, drop):
    """Return the accuracy of MoCo's protocol in plain torch, an independent implementation.

    It computes all features first. The seed determines the order of the images.
    """
    net = models.resnet18()
    state = {
        name.removeprefix("module.encoder_q."): value
        for name, value in load(pretrained)["state_dict"].items()
    }
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    loaded = net.load_state_dict(body, strict=False)
    assert set(loaded.missing_keys) == {"fc.weight", "fc.bias"}
    net.fc = torch.nn.Identity()
    net.eval()
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = transforms.Compose(
        [transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(), normalize]
    )
    sets = {}
    for split in ("train", "val"):
        paths = sorted((data / split).glob("*/*"))
        views = torch.stack([crop(Image.open(path).convert("RGB")) for path in paths])
        with torch.no_grad():
            features = torch.cat([net(batch_views) for batch_views in views.split(64)])
        sets[split] = features, torch.tensor([int(path.parent.name) for path in paths])
    features, labels = sets["train"]
    fc = torch.nn.Linear(512, 10)
    torch.nn.init.normal_(fc.weight, std=0.01)
    torch.nn.init.zeros_(fc.bias)
    sgd = torch.optim.SGD(fc.parameters(), rate, momentum=0.9)
    for epoch in range(epochs):
        sgd.param_groups[0]["lr"] = rate * (0.1 if epoch >= drop else 1)
        order = torch.from_numpy(randomness.permutation(len(labels), 0, "order", epoch=epoch))
        for indices in order.split(batch)[: len(labels) // batch]:
            sgd.zero_grad()
            F.cross_entropy(fc(features[indices]), labels[indices]).backward()
            sgd.step()
    features, labels = sets["val"]
    with torch.no_grad():
        return 100 * (fc(features).argmax(1) == labels).double().mean().item()


def test_accuracy_of_digits_is_the_reference_s(start_job, digits, pretrained, tmp_path):
    """The initial weights of `fc` differ. After these epochs they no longer matter."""
    options = "--image-size 32 --batch-size 64 --epochs 8 --schedule 5 --lr 0.1 -j 0".split()
    options += ["--no-augment", "--save-every", 8, "--pretrained", pretrained]
    job = start_job(2, tmp_path / "run", [digits, *options], "job.linear")
    output = job.finish()
    assert job.process.returncode == 0, output
    accuracy = of_kind(job.folder, "validation")[-1]["val_top1"]
    expected = reference_accuracy(digits, pretrained, 8, 64, 0.1, 5)
    assert 80 < expected < 100
    assert abs(accuracy - expected) <= 0.5


def test_accuracies_are_equal_on_any_workers(start_job, trained, labelled, pretrained, tmp_path):
    last, lines = trained[0] / "last.pth.tar", set()
    for workers in (1, 2, 3):
        arguments = [labelled, "-j", 0, "--evaluate", "--resume", last]
        evaluated = start_job(workers, tmp_path / f"e{workers}", arguments, "job.linear")
        arguments = [labelled, "-j", 0, "--knn", "--pretrained", pretrained, "--image-size", 32]
        knn = start_job(workers, tmp_path / f"k{workers}", arguments, "job.linear")
        outputs = evaluated.finish(), knn.finish()
        assert (evaluated.process.returncode, knn.process.returncode) == (0, 0), outputs
        assert not evaluated.folder.exists() and not knn.folder.exists()
        lines.add((*validated(outputs[0]), *re.findall(r"k-NN accuracy .*", outputs[1])))
    [(validation, neighbours)] = lines
    assert validation == validated(trained[1])[-1]
    assert f"on {VAL - 1} of {VAL} images of" in neighbours
    assert f"k = {TRAIN // CLASSES} among {TRAIN} images of" in neighbours


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """256 training and 60 validation images of noise."""
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(2)
    for split, number in (("train", 256), ("val", 60)):
        for index in range(number):
            path = folder / split / f"class{index % CLASSES}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(path)
    return folder


def test_training_has_the_same_bytes_on_any_workers(start_job, noise, tmp_path):
    """A worker has complete groups of 32 images. At this rate any rounding changes the weights."""
    options = "--image-size 16 --width 16 --batch-size 128 --epochs 2 --lr 1000 -j 0".split()
    folders = [tmp_path / f"run{workers}" for workers in (1, 2, 4)]
    for workers, folder in zip((1, 2, 4), folders, strict=True):
        job = start_job(workers, folder, [noise, *options], "job.linear")
        output = job.finish()
        assert job.process.returncode == 0, output
    for folder in folders[1:]:
        for name in ("last.pth.tar", "best.pth.tar"):
            assert differences(folders[0], folder, name) == ["/workers"]
        assert records(folder) == records(folders[0])


def test_lars_resumes_to_the_same_bytes(start_job, noise, tmp_path):
    """A step adds 0.001 |weight| to the momentum. --evaluate needs no --lars."""
    common = "--image-size 16 --width 16 -j 0".split()
    options = "--batch-size 64 --epochs 2 --lars --lr 500 --keep 9 --save-every 1steps".split()
    options += common
    one, two = tmp_path / "one", tmp_path / "two"
    job = start_job(2, two, [noise, *options], "job.linear")
    output = job.finish()
    assert job.process.returncode == 0, output
    before, after = (load(two / f"checkpoint_0000_00000{step}.pth.tar") for step in (2, 3))
    states = [content["optimizer"]["state"][0] for content in (before, after)]
    first, second = (state["momentum_buffer"] for state in states)
    expected = 0.001 * before["state_dict"]["module.fc.weight"].norm()
    torch.testing.assert_close((second - 0.9 * first).norm(), expected, rtol=1e-3, atol=0)
    one.mkdir()
    shutil.copy(two / "checkpoint_0000_000003.pth.tar", one)
    resumed = linear(noise, *options, "--resume", "auto", "--out", one)
    assert resumed.returncode == 0 and of_kind(one, "resumed"), resumed.stderr
    assert differences(two, one) == differences(two, one, "best.pth.tar") == ["/workers"]
    evaluated = linear(noise, *common, "--evaluate", "--resume", one / "last.pth.tar")
    assert evaluated.returncode == 0, evaluated.stderr
    assert validated(evaluated.stdout) == validated(output)[-1:]


def test_steps_count_once_after_other_batch_sizes(labelled, pretrained, tmp_path):
    options = [labelled, "--pretrained", pretrained, "--image-size", 16, "-j", 0, "--cos"]
    options += ["--resume", "auto", "--tensorboard", "-p", 1, "--out", tmp_path]
    for epochs, batch_size in ((1, 30), (2, 60), (3, 15)):
        done = linear(*options, "--epochs", epochs, "--batch-size", batch_size)
        assert done.returncode == 0, done.stderr
        warnings = [record["id"] for record in of_kind(tmp_path, "warning")]
        assert warnings == ["rate_jump"] * (epochs - 1)  # one at each resume
    check_steps(tmp_path, 3 + 1 + 6)
    validations = [record["steps"] for record in of_kind(tmp_path, "validation")]
    assert validations == [3, 4, 10]


def test_interrupted_run_resumes_to_the_same_bytes(
    start_job, trained, labelled, pretrained, tmp_path
):
    options = [labelled, *SMALL, "--pretrained", pretrained, "--keep", 9, "--resume", "auto"]
    job = start_job(2, tmp_path / "run", [*options, "--save-every", "3steps"], "job.linear")
    job.wait_for_step(4)
    job.kill()
    job = start_job(2, tmp_path / "run", options, "job.linear")
    job.wait_for_step(STEPS + 3)
    job.workers()[1].terminate()
    output = job.finish()
    assert job.process.returncode == 0, output
    assert of_kind(job.folder, "end")[-1]["how"] == "stopped", output
    resumed = start_job(2, tmp_path / "run", options, "job.linear")
    output = resumed.finish()
    assert resumed.process.returncode == 0 and len(of_kind(resumed.folder, "resumed")) == 2, output
    assert resumed.steps() == list(range(1, 3 * STEPS + 1))
    one, other = (load(folder / "last.pth.tar") for folder in (trained[0], resumed.folder))
    assert one["best_acc1"] == other["best_acc1"]
    assert different(one["state_dict"], other["state_dict"]) == ""
    momenta = [
        [state["momentum_buffer"] for state in content["optimizer"]["state"].values()]
        for content in (one, other)
    ]
    assert len(momenta[0]) == 2 and all(torch.equal(*pair) for pair in zip(*momenta, strict=True))


# A tensor for FLIP: a running variance of the frozen network.
FROZEN = "next(l.frame.f_locals['parts'] for l in inspect.stack() if 'parts' in l.frame.f_locals)"
FROZEN += ".net.bn1.running_var[:1]"


@pytest.mark.parametrize(
    ("check_every", "save_every", "error", "first"),
    [
        (3, "2steps", "after epoch 0, step 3: 1 of ", "fc.bias"),
        (99, 9, "after epoch 1, step 0, and are not saved: 1 of ", "bn1."),
    ],
    ids=["in the classifier", "in the frozen statistics"],
)
def test_flipped_bit_ends_the_run_and_is_not_saved(
    start_job, labelled, pretrained, tmp_path, monkeypatch, check_every, save_every, error, first
):
    """The next check or save, whichever is first, ends the run."""
    flip = (
        FLIP
        if first == "fc.bias"
        else "import inspect" + FLIP.replace('self.param_groups[0]["params"][:6][-1]', FROZEN)
    )
    (tmp_path / "sitecustomize.py").write_text(flip)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = [labelled, *SMALL, "--pretrained", pretrained]
    options += ["--check-every", check_every, "--save-every", save_every]
    job = start_job(2, tmp_path / "run", options, "job.linear")
    output = job.finish()
    assert job.process.returncode != 0
    [end] = of_kind(job.folder, "end")
    assert (end["how"], end["code"]) == ("error", 1), output
    assert all(part in end["text"] for part in (error, f" {first}", "worker 1 "))
    assert output.count(f"error: {end['text']}\n") == 1, output
    saved = ["checkpoint_0000_000002.pth.tar"] if save_every == "2steps" else []
    assert [path.name for path in job.folder.glob("checkpoint_*")] == saved


def test_pretrained_file_sets_network_and_crop(labelled, pretrained, tmp_path):
    options = ["--pretrained", pretrained, "--epochs", 1, "--batch-size", 45, "-j", 0]
    done = linear(labelled, *options, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = load(tmp_path / "run" / "last.pth.tar")["config"]
    assert (config["arch"], config["stem"], config["image_size"]) == ("resnet18", "imagenet", 48)


def test_default_network_is_the_initial_student(labelled, tmp_path):
    options = ["--image-size", 32, "--epochs", 1, "--batch-size", 45, "-j", 0]
    done = linear(labelled, *options, "--stem", "small", "--width", 16, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout
    torch.manual_seed(randomness.torch_seed(0, "weights"))
    start = build_moco(
        comm, "resnet18", mlp=True, stem="small", width=16, stages=[1, 2, 3, 4]
    ).encoder_q.state_dict()
    start = {name: value for name, value in start.items() if not name.startswith("fc.")}
    saved = load(tmp_path / "run" / "last.pth.tar")["state_dict"]
    saved = {name.removeprefix("module."): value for name, value in saved.items()}
    assert different(saved, start) == ""


REFUSED = {
    "--evaluate": "--evaluate: expected a classifier",
    "--resume {pretrained}": "not a linear classifier",
    "--resume {older}": "the checkpoint has format 2; expected 3. "
    "Resume with the version that saved it",
    "--resume {trained}": "was trained on other features",
    "--resume {trained} --pretrained {pretrained} --out {other}": "has another run than --resume",
    "--resume {trained} --pretrained {pretrained} --lars": "was trained with SGD; "
    "expected the same",
    "--resume {lars} --pretrained {pretrained}": "with LARS; expected the same optimizer. Give",
    "--pretrained {pretrained} -a resnet50": "does not fit resnet50",
    "--pretrained {pretrained} --stem small": "has the stem imagenet",
    "--pretrained {pretrained} --width 32": "has 64 channels in its first stage",
    "--batch-size 91": "has only 90 images; expected at most 90. Choose",
    "--pretrained nowhere.pth.tar": "--pretrained nowhere.pth.tar: no such file",
    "--gpu 0": "--gpu: not an option of this program",
    "--moco-k 5": "unrecognized arguments: --moco-k 5",
    "--image-size 3": "--image-size 3: expected 8 or more",
    "--data {differ}": "expected one of them",
}


@pytest.fixture(scope="module")
def errors(labelled, trained, pretrained, tmp_path_factory):
    """The error line of each of REFUSED by its arguments, and of a folder with other classes."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "other").mkdir()
    (folder / "other" / "checkpoint_0007_000000.pth.tar").touch()
    for split in ("train", "val"):
        (folder / "differ" / split).mkdir(parents=True)
        for name in ("class0", "class1" if split == "train" else "class2"):
            (folder / "differ" / split / name).symlink_to(labelled / split / name)
    names = {"pretrained": pretrained, "trained": trained[0] / "last.pth.tar"}
    torch.save(load(names["trained"]) | {"format": 2}, folder / "older.pth.tar")
    content = load(names["trained"])
    torch.save(content | {"config": content["config"] | {"lars": True}}, folder / "lars.pth.tar")
    names |= {"older": folder / "older.pth.tar", "lars": folder / "lars.pth.tar"}
    names |= {"other": folder / "other", "differ": folder / "differ"}
    common = ["--batch-size", 45, "--out", folder / "run", "-j", 0]
    commands = [[labelled, *common, *arguments.format(**names).split()] for arguments in REFUSED]
    lines = errors_of("job.linear", [*commands, [folder / "differ", *common]])
    assert not (folder / "run").exists()
    assert len(list((folder / "other").iterdir())) == 1
    return dict(zip([*REFUSED, "classes"], lines, strict=True))


@pytest.mark.parametrize("arguments", REFUSED)
def test_invalid_options(errors, arguments):
    assert REFUSED[arguments] in errors[arguments]


def test_different_classes(errors):
    assert "must have the same classes; in one of them only: class1, class2" in errors["classes"]


def test_run_finished_or_diverging_keeps_its_files(trained, labelled, pretrained, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("checkpoint_0003_000000.pth.tar", "best.pth.tar"):
        (tmp_path / "run" / name).write_bytes((trained[0] / name).read_bytes())
    options = [labelled, *SMALL, "--pretrained", pretrained, "--out", tmp_path / "run"]
    options += ["--resume", "auto"]
    before = contents(tmp_path / "run")
    done = linear(*options, "--epochs", 2)
    assert done.returncode == 0 and done.stdout.endswith(
        "changed: 3 epochs are done; --epochs is 2\n"
    )
    assert "--epochs was 3 in the checkpoint" in done.stdout
    assert contents(tmp_path / "run") == before
    done = linear(*options, "--epochs", 5, "--lr", "1e38", "--schedule", 9)
    assert done.returncode == 1 and of_kind(tmp_path / "run", "end")[-1]["code"] == 1
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth.tar")) == [
        "best.pth.tar",
        "checkpoint_0003_000000.pth.tar",
        "last.pth.tar",
    ]
