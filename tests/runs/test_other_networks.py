"""Networks of timm by the real commands: train, resume, evaluate, embed, report, export."""

import functools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import nn

from runs import differences, errors_of, of_kind

MOBILE, VIT = "timm/mobilenetv3_small_050", "timm/test_vit"
SMALL = "--image-size 32 --batch-size 8 -j 0 --moco-k 12 --mlp --lr 0.01 --warmup-epochs 0".split()
COURSE = "--epochs 2 --knn-every 2 --save-every 4steps --keep 9".split()
WITHIN = "checkpoint_0000_000004.pth.tar"  # of six steps an epoch
OF_VIT = ["--teacher-arch", VIT, "--teacher-size", 64]
LINEAR = "--batch-size 8 -j 0 --epochs 2 --schedule 9".split()
MOBILENET, RESNET = "mobilenet from a resnet", "resnet from a vit"
PAIRS = {  # options without the teacher's file
    MOBILENET: ["-a", MOBILE, *"--distill mgd simreg --mgd-images 50".split()],
    RESNET: [*"-a resnet18 --distill simreg similarity --similarity-k 9".split(), *OF_VIT],
}


def program(name, *arguments):
    """Run a program with one worker. Return its output."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """A ViT of timm with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run_two(start_job, images):
    """A function that runs a program with two workers. It returns the output."""

    def run(folder, arguments, program="job.train"):
        job = start_job(2, folder, [images, *arguments], program)
        output = job.finish()
        assert job.process.returncode == 0, output
        return output

    return run


@pytest.fixture(scope="module")
def commands(teacher_file, vit_file):
    """The options of each pair."""
    teachers = {MOBILENET: teacher_file, RESNET: vit_file}
    return {pair: [*SMALL, *COURSE, *PAIRS[pair], "--teacher", teachers[pair]] for pair in PAIRS}


@pytest.fixture(scope="module")
def trained(run_two, commands, tmp_path_factory):
    """A function from a pair to its student's folder. The linear run is in the next folder."""

    @functools.cache
    def train(pair):
        folder = tmp_path_factory.mktemp("runs") / "mine"
        run_two(folder, commands[pair])
        pretrained = ["--pretrained", folder / "last.pth.tar"]
        run_two(folder.with_name("mine-linear"), [*LINEAR, *pretrained], "job.linear")
        return folder

    return train


@pytest.mark.parametrize("pair", PAIRS)
def test_resumed_run_has_the_same_bytes(trained, run_two, commands, pair, tmp_path):
    """The checkpoint is within an epoch."""
    shutil.copy(trained(pair) / WITHIN, tmp_path)
    assert "resuming from" in run_two(tmp_path, [*commands[pair], "--resume", "auto"])
    assert differences(trained(pair), tmp_path) == []


def test_log_has_the_teacher_s_images(trained):
    [record] = of_kind(trained(RESNET), "teacher")
    assert record["arch"] == VIT
    images = "its images: mean and deviation (0.5, 0.5, 0.5) and (0.5, 0.5, 0.5), 64 x 64 pixels"
    assert f"{images}\n" in (trained(RESNET) / "log.txt").read_text()


@pytest.mark.parametrize("pair", PAIRS)
def test_linear_evaluates_the_student_s_classifier(trained, images, pair):
    """The accuracies are those in the records of its training."""
    folder = trained(pair).with_name("mine-linear")
    options = ["--evaluate", "--resume", folder / "last.pth.tar", "-j", 0]
    evaluated = program("job.linear", images, *options)
    last = of_kind(folder, "validation")[-1]
    shown = re.search(r"validation on .*: top-1 (\S+) %, top-5 (\S+) %", evaluated).groups()
    assert shown == tuple(f"{last[name]:.2f}" for name in ("val_top1", "val_top5"))


def test_linear_knn(trained, images, tmp_path):
    options = ["--pretrained", trained(MOBILENET) / "last.pth.tar", "--batch-size", 8, "-j", 0]
    neighbours = program("job.linear", images, "--knn", *options, "--out", tmp_path / "knn")
    assert "k-NN accuracy" in neighbours and f"frozen: {MOBILE} from" in neighbours


def test_classifier_keeps_the_network_s_input(images, vit_file, tmp_path):
    """Mean, deviation and size are timm's. --evaluate gives the same accuracy."""
    out, last = tmp_path / "linear", tmp_path / "linear" / "last.pth.tar"
    options = ["--pretrained", vit_file, "-a", VIT, "--batch-size", 8, "-j", 0, "--out", out]
    trained = program("job.linear", images, *options, "--epochs", 1, "--schedule", 9)
    evaluated = program("job.linear", images, "--evaluate", "--resume", last, "-j", 0)
    first, second = (re.search(r"validation on .*", text)[0] for text in (trained, evaluated))
    assert first == second
    saved = torch.load(last, weights_only=True)
    assert saved["input"] == {"image_size": 160, "mean": [0.5] * 3, "std": [0.5] * 3}


@torch.no_grad()
def test_embed_of_timm_networks(trained, vit_file, images, tmp_path):
    """A student, and a file with timm's mean and size."""
    options = ["--pretrained", trained(MOBILENET) / "last.pth.tar", "--out", tmp_path / "a.npy"]
    program("job.embed", images, *options, "-j", 0)
    assert np.load(tmp_path / "a.npy").shape == (59, 1024)
    options = ["--pretrained", vit_file, "-a", VIT, "--out", tmp_path / "b.npy"]
    program("job.embed", images, *options, "-j", 0)
    about = json.loads((tmp_path / "b.json").read_text())
    assert about["image_size"] == 160 and about["input"]["mean"] == [0.5, 0.5, 0.5]
    assert np.load(tmp_path / "b.npy").shape == (59, 64)


def test_report_has_the_neighbours(trained, images, tmp_path):
    program("job.show.report", trained(MOBILENET), "--out", tmp_path / "report.html")
    assert MOBILE in (tmp_path / "report.html").read_text()
    names = [picture.name for picture in (tmp_path / "report-pictures").iterdir()]
    assert any("neighbours" in name for name in names), names


def build_independently(pair, checkpoint):
    """Return a checkpoint's student without its head, built without this program."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    if pair == MOBILENET:
        start = "module.encoder_q.body."
        net = timm.create_model("mobilenetv3_small_050", num_classes=0)
    else:
        start, net = "module.encoder_q.", torchvision.models.resnet18()
        net.fc = nn.Identity()
    inside = {name.removeprefix(start): state[name] for name in state if name.startswith(start)}
    net.load_state_dict({name: inside[name] for name in inside if not name.startswith("fc.")})
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS)
def test_exported_student_loads_elsewhere(trained, commands, pair, tmp_path):
    """In timm and onnxruntime its features are the same. The card has the records' figures."""
    checkpoint = trained(pair) / "last.pth.tar"
    for name in ("model.safetensors", "model.onnx"):
        program("job.export", checkpoint, tmp_path / name)
    network = build_independently(pair, checkpoint)
    name, file = PAIRS[pair][1].removeprefix("timm/"), tmp_path / "model.safetensors"
    built = [timm.create_model(name, num_classes=0, checkpoint_path=file)]
    built.append(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    cpu = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=cpu)
    for size in ((64, 96), (75, 41)):
        pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
        expected = network(pixels)
        for net in built:
            torch.testing.assert_close(net.eval()(pixels), expected)
        [of_onnx] = session.run(None, {"images": pixels.numpy()})
        np.testing.assert_allclose(of_onnx, expected, atol=1e-4 * float(expected.abs().max()))

    card = (tmp_path / "model.md").read_text()
    [knn] = of_kind(trained(pair), "knn")
    last = of_kind(trained(pair).with_name("mine-linear"), "validation")[-1]
    figures = [f"{value:.2f}" for value in (knn["knn"], last["val_top1"], last["val_top5"])]
    assert re.findall(r"^- .*?: \*\*(\S+) %\*\*", card, re.MULTILINE) == figures
    digest = torch.load(checkpoint, weights_only=True)["teacher"]
    [teacher] = of_kind(trained(pair), "teacher")
    file = commands[pair][-1].name
    assert f"- Teacher: `{teacher['arch']}` from `{file}`, digest `{digest}`" in card
    assert f"\n`{PAIRS[pair][1]}` without its head: " in card and ", over 2 workers\n" in card


def test_incompatible_pair_writes_no_file(images, vit_file, tmp_path):
    command = [images, *SMALL, "-a", MOBILE, "--teacher", vit_file, "--teacher-arch", VIT]
    command += ["--out", tmp_path / "run"]
    [message] = errors_of("job.train", [[*command, "--distill", "mgd"]])
    assert (
        "--distill mgd: the maps of layer1 are " in message
        and "Use one of: simreg, similarity" in message
    )
    assert not (tmp_path / "run").exists()
