"""Whole runs of the linear classifier: against an implementation of its own, at any number of workers, and errors."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import models, transforms

from runs import FLIP, check_steps, contents, differences, errors_of, of_kind, records
from job.evaluate.classifier import different
from job.cluster import comm
from job.data import randomness
from job.data.digits import write_digits
from job.networks import build_resnet
from job.frameworks.moco import build_moco

TRAIN, VAL, CLASSES = (
    90,
    131,
    6,
)  # 131: two full batches of validation and three images, which no worker count shares
SMALL = "--image-size 32 --batch-size 12 --epochs 3 --schedule 2 --lr 0.3 -j 0".split()
STEPS = TRAIN // 12


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Images of six classes that differ in colour, and noise that hides it from some; the last cannot be decoded."""
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(1)
    for split, number in (("train", TRAIN), ("val", VAL)):
        for place in range(number):
            path = folder / split / f"class{place % CLASSES}" / f"{place:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 140, (36, 40, 3))
            pixels[:, :, place % 3] += 35 * (1 + place % CLASSES // 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    path.write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint as `job.train` leaves it, of random weights and statistics."""
    torch.manual_seed(7)
    net = build_resnet("resnet18", mlp=True)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("pretrained") / "last.pth.tar"
    state = {f"module.encoder_q.{name}": value for name, value in net.state_dict().items()}
    torch.save(
        {
            "epoch": 3,
            "step": 0,
            "arch": "resnet18",
            "state_dict": state,
            "config": {"image_size": 48},
            "format": 1,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def trained(start_job, labelled, pretrained, tmp_path_factory):
    """A run of two workers that nothing interrupts: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("linear") / "run"
    job = start_job(
        2,
        folder,
        [labelled, *SMALL, "--pretrained", pretrained, "--keep", 9, "--tensorboard"],
        "job.linear",
    )
    output = job.finish()
    assert job.process.returncode == 0, output
    return folder, output


def load(path):
    return torch.load(path, weights_only=True)


def linear(*arguments):
    """One worker, without a launcher."""
    command = [sys.executable, "-m", "job.linear", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def validated(output):
    """The accuracies that a run has printed."""
    return re.findall(r"validation on .*", output)


def test_it_learns_and_tells_the_validation_of_each_epoch(trained, labelled):
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


def test_tensorboard_shows_what_the_metrics_have(trained):
    folder, _ = trained
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    of_validation = of_kind(folder, "validation")
    for name in ("val_loss", "val_top1", "val_top5"):
        found = [(event.step, event.value) for event in shown.Scalars(f"validation/{name}")]
        assert found == [
            (record["steps"] - 1, pytest.approx(record[name])) for record in of_validation
        ]
    last = [record for record in of_kind(folder, "step") if record["step"] == STEPS - 1]
    found = [(event.step, event.value) for event in shown.Scalars("steps/top1")]
    assert found == [(record["steps"] - 1, pytest.approx(record["top1"])) for record in last]


def test_only_the_classifier_is_trained(trained, pretrained):
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


def test_the_best_checkpoint_is_that_of_the_best_epoch(trained):
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


def slow_classifier(data, pretrained, epochs, batch, rate, drop):
    """MoCo's protocol in plain torch, the independent statement of it, on features computed beforehand.

    The images have the order that the seed gives.
    """
    net = models.resnet18()
    state = {
        name.removeprefix("module.encoder_q."): value
        for name, value in load(pretrained)["state_dict"].items()
    }
    found = net.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith("fc.")}, strict=False
    )
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}
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
            features = torch.cat([net(some) for some in views.split(64)])
        sets[split] = features, torch.tensor([int(path.parent.name) for path in paths])
    features, labels = sets["train"]
    fc = torch.nn.Linear(512, 10)
    torch.nn.init.normal_(fc.weight, std=0.01)
    torch.nn.init.zeros_(fc.bias)
    sgd = torch.optim.SGD(fc.parameters(), rate, momentum=0.9)
    for epoch in range(epochs):
        sgd.param_groups[0]["lr"] = rate * (0.1 if epoch >= drop else 1)
        order = torch.from_numpy(randomness.permutation(len(labels), 0, "order", epoch=epoch))
        for some in order.split(batch)[: len(labels) // batch]:
            sgd.zero_grad()
            F.cross_entropy(fc(features[some]), labels[some]).backward()
            sgd.step()
    features, labels = sets["val"]
    with torch.no_grad():
        return 100 * (fc(features).argmax(1) == labels).double().mean().item()


def test_it_agrees_with_an_implementation_of_its_own_on_the_digits(
    start_job, digits, pretrained, tmp_path
):
    """The start of `fc` differs, so it trains to where that no longer matters."""
    options = "--image-size 32 --batch-size 64 --epochs 8 --schedule 5 --lr 0.1 -j 0 --no-augment --save-every 8".split()
    job = start_job(
        2, tmp_path / "run", [digits, *options, "--pretrained", pretrained], "job.linear"
    )
    output = job.finish()
    assert job.process.returncode == 0, output
    found = [record["val_top1"] for record in of_kind(job.folder, "validation")][-1]
    expected = slow_classifier(digits, pretrained, 8, 64, 0.1, 5)
    assert 80 < expected < 100
    assert abs(found - expected) <= 0.5


def test_accuracies_are_the_same_at_any_number_of_workers(
    start_job, trained, labelled, pretrained, tmp_path
):
    last, told = trained[0] / "last.pth.tar", set()
    for workers in (1, 2, 3):
        arguments = [labelled, "-j", 0, "--evaluate", "--resume", last]
        evaluated = start_job(workers, tmp_path / f"e{workers}", arguments, "job.linear")
        arguments = [labelled, "-j", 0, "--knn", "--pretrained", pretrained, "--image-size", 32]
        by_neighbours = start_job(workers, tmp_path / f"k{workers}", arguments, "job.linear")
        outputs = evaluated.finish(), by_neighbours.finish()
        assert (evaluated.process.returncode, by_neighbours.process.returncode) == (0, 0), outputs
        assert not evaluated.folder.exists() and not by_neighbours.folder.exists()
        told.add((*validated(outputs[0]), *re.findall(r"k-NN accuracy .*", outputs[1])))
    [(validation, neighbours)] = told
    assert validation == validated(trained[1])[-1]
    assert (
        f"on {VAL - 1} of {VAL} images of" in neighbours
        and f"k = {TRAIN // CLASSES} among {TRAIN} images of" in neighbours
    )


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Images of noise: 256 to train on, 60 to validate on."""
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(2)
    for split, number in (("train", 256), ("val", 60)):
        for place in range(number):
            path = folder / split / f"class{place % CLASSES}" / f"{place:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(path)
    return folder


def test_training_ends_in_the_same_bytes_at_any_number_of_workers_that_share_whole_groups(
    start_job, noise, tmp_path
):
    """Whole groups of 32 images; at this rate, each rounding becomes another classifier."""
    options = "--image-size 16 --width 16 --batch-size 128 --epochs 2 --lr 1000 -j 0".split()
    folders = [tmp_path / f"run{workers}" for workers in (1, 2, 4)]
    for workers, folder in zip((1, 2, 4), folders, strict=True):
        job = start_job(workers, folder, [noise, *options], "job.linear")
        output = job.finish()
        assert job.process.returncode == 0, output
    for folder in folders[1:]:
        assert (
            differences(folders[0], folder)
            == differences(folders[0], folder, "best.pth.tar")
            == ["/workers"]
        )
        assert records(folder) == records(folders[0])


def test_lars_resumes_to_the_same_bytes_with_another_number_of_workers(start_job, noise, tmp_path):
    """Within an epoch. A step adds 0.001 |weight| to the momentum. --evaluate needs no --lars."""
    shared = "--image-size 16 --width 16 -j 0".split()
    options = "--batch-size 64 --epochs 2 --lars --lr 500 --keep 9 --save-every 1steps".split()
    options += shared
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
    evaluated = linear(noise, *shared, "--evaluate", "--resume", one / "last.pth.tar")
    assert evaluated.returncode == 0, evaluated.stderr
    assert validated(evaluated.stdout) == validated(output)[-1:]


def test_a_run_that_changes_its_batch_size_counts_each_step_once(labelled, pretrained, tmp_path):
    options = [labelled, "--pretrained", pretrained, "--image-size", 16, "-j", 0, "--cos"]
    options += ["--resume", "auto", "--tensorboard", "-p", 1, "--out", tmp_path]
    for epochs, batch_size in ((1, 30), (2, 60), (3, 15)):
        done = linear(*options, "--epochs", epochs, "--batch-size", batch_size)
        assert done.returncode == 0, done.stderr
        assert [record["id"] for record in of_kind(tmp_path, "warning")] == ["rate_jump"] * (
            epochs - 1
        )  # at each resume
    check_steps(tmp_path, 3 + 1 + 6)
    validations = [record["steps"] for record in of_kind(tmp_path, "validation")]
    assert validations == [3, 4, 10]


def test_a_run_killed_and_then_signalled_resumes_to_the_same_bytes(
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
    assert job.process.returncode == 0 and of_kind(job.folder, "end")[-1]["how"] == "stopped", (
        output
    )
    again = start_job(2, tmp_path / "run", options, "job.linear")
    output = again.finish()
    assert again.process.returncode == 0 and len(of_kind(again.folder, "resumed")) == 2, output
    assert again.steps() == list(range(1, 3 * STEPS + 1))
    one, other = (load(folder / "last.pth.tar") for folder in (trained[0], again.folder))
    assert one["best_acc1"] == other["best_acc1"]
    assert different(one["state_dict"], other["state_dict"]) == ""
    momenta = [
        [part["momentum_buffer"] for part in content["optimizer"]["state"].values()]
        for content in (one, other)
    ]
    assert len(momenta[0]) == 2 and all(torch.equal(*pair) for pair in zip(*momenta, strict=True))


# In FLIP's place for a bit: a running variance of the frozen network.
FROZEN = "next(l.frame.f_locals['parts'] for l in inspect.stack() if 'parts' in l.frame.f_locals).net.bn1.running_var[:1]"


@pytest.mark.parametrize(
    ("check_every", "save_every", "said", "first"),
    [
        (3, "2steps", "after epoch 0, step 3: 1 of ", "fc.bias"),
        (99, 9, "after epoch 1, step 0, and are not saved: 1 of ", "bn1."),
    ],
    ids=["in the classifier", "in the frozen statistics"],
)
def test_a_bit_that_flips_on_one_worker_ends_the_run_and_is_not_saved(
    start_job, labelled, pretrained, tmp_path, monkeypatch, check_every, save_every, said, first
):
    """At the next check, or at the next save if that comes first."""
    flip = (
        FLIP
        if first == "fc.bias"
        else "import inspect"
        + FLIP.replace('self.param_groups[0]["params"][:6][-1].detach()', FROZEN)
    )
    (tmp_path / "sitecustomize.py").write_text(flip)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = [
        labelled,
        *SMALL,
        "--pretrained",
        pretrained,
        "--check-every",
        check_every,
        "--save-every",
        save_every,
    ]
    job = start_job(2, tmp_path / "run", options, "job.linear")
    output = job.finish()
    assert job.process.returncode != 0
    [end] = of_kind(job.folder, "end")
    assert (end["how"], end["code"]) == ("error", 1), output
    assert all(part in end["text"] for part in (said, f" {first}", "worker 1 "))
    assert output.count(f"error: {end['text']}\n") == 1, output
    saved = ["checkpoint_0000_000002.pth.tar"] if save_every == "2steps" else []
    assert [path.name for path in job.folder.glob("checkpoint_*")] == saved


def test_the_crop_and_the_network_follow_the_pretraining(labelled, pretrained, tmp_path):
    ended = linear(
        labelled,
        "--pretrained",
        pretrained,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--batch-size",
        45,
        "-j",
        0,
    )
    assert ended.returncode == 0, ended.stderr
    config = load(tmp_path / "run" / "last.pth.tar")["config"]
    assert (config["arch"], config["stem"], config["image_size"]) == ("resnet18", "imagenet", 48)


def test_without_a_checkpoint_the_network_is_the_student_at_its_start(labelled, tmp_path):
    options = ["--image-size", 32, "--epochs", 1, "--batch-size", 45, "-j", 0]
    ended = linear(labelled, *options, "--stem", "small", "--width", 16, "--out", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert "random weights" in ended.stdout
    torch.manual_seed(randomness.torch_seed(0, "weights"))
    start = build_moco(
        comm, "resnet18", mlp=True, stem="small", width=16, stages=[1, 2, 3, 4]
    ).encoder_q.state_dict()
    start = {name: value for name, value in start.items() if not name.startswith("fc.")}
    found = load(tmp_path / "run" / "last.pth.tar")["state_dict"]
    assert (
        different({name.removeprefix("module."): value for name, value in found.items()}, start)
        == ""
    )


REFUSED = {
    "--evaluate": "--evaluate: expected a classifier",
    "--resume {pretrained}": "not a linear classifier",
    "--resume {older}": "the checkpoint has format 2; expected 3. Resume with the version that saved it",
    "--resume {trained}": "was trained on other features",
    "--resume {trained} --pretrained {pretrained} --out {other}": "has another run than --resume",
    "--resume {trained} --pretrained {pretrained} --lars": "was trained with SGD; expected the same",
    "--resume {lars} --pretrained {pretrained}": "with LARS; expected the same optimizer. Give",
    "--pretrained {pretrained} -a resnet50": "does not fit resnet50",
    "--pretrained {pretrained} --stem small": "has the stem imagenet",
    "--pretrained {pretrained} --width 32": "has 64 channels in its first stage",
    "--batch-size 91": "90 images, fewer than --batch-size 91",
    "--pretrained nowhere.pth.tar": "nowhere.pth.tar: no such file",
    "--gpu 0": "--gpu: not an option of this program",
    "--moco-k 5": "unrecognized arguments: --moco-k 5",
    "--image-size 3": "--image-size 3: expected 8 or more",
    "--data {differ}": "two data folders",
}


@pytest.fixture(scope="module")
def errors(labelled, trained, pretrained, tmp_path_factory):
    """The line with which each of REFUSED is, by its arguments; last, that of a folder whose classes differ."""
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
def test_what_cannot_be_classified_is_one_line_and_exit_code_2(errors, arguments):
    assert REFUSED[arguments] in errors[arguments]


def test_classes_that_differ_are_named(errors):
    assert "must have the same classes; in one of them only: class1, class2" in errors["classes"]


def test_a_finished_run_says_so_and_a_diverging_one_is_not_saved(
    trained, labelled, pretrained, tmp_path
):
    for name in ("checkpoint_0003_000000.pth.tar", "best.pth.tar"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes((trained[0] / name).read_bytes())
    options = [
        labelled,
        *SMALL,
        "--pretrained",
        pretrained,
        "--out",
        tmp_path / "run",
        "--resume",
        "auto",
    ]
    before = contents(tmp_path / "run")
    ended = linear(*options, "--epochs", 2)
    assert ended.returncode == 0 and ended.stdout.endswith(
        "changed: 3 epochs are done; --epochs is 2\n"
    )
    assert "--epochs was 3 in the checkpoint" in ended.stdout
    assert contents(tmp_path / "run") == before
    ended = linear(*options, "--epochs", 5, "--lr", "1e38", "--schedule", 9)
    assert ended.returncode == 1 and of_kind(tmp_path / "run", "end")[-1]["code"] == 1
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth.tar")) == [
        "best.pth.tar",
        "checkpoint_0003_000000.pth.tar",
        "last.pth.tar",
    ]
