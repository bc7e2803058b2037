"""Networks of timm by the real commands: trained from a ViT, resumed, evaluated, embedded, and shown in a report."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from runs import errors_of, of_kind

MOBILE, VIT = "timm/mobilenetv3_small_050", "timm/test_vit"
SMALL = ["--image-size", 32, "--batch-size", 8, "-j", 0, "--moco-k", 12, "--mlp", "--lr", 0.01, "--warmup-epochs", 0]


def program(name, *words):
    """Run a program of one worker; return its output."""
    command = [sys.executable, "-m", name, *map(str, words)]
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
def trained(images, vit_file, tmp_path_factory):
    """The folder of a student trained for two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(images, vit_file, folder, "--epochs", 2, "--knn-every", 2)
    return folder


def train(images, vit_file, folder, *more):
    options = ["-a", MOBILE, "--teacher", vit_file, "--teacher-arch", VIT, "--distill", "simreg", "similarity"]
    return program("job.train", images, *SMALL, *options, "--similarity-k", 9, "--out", folder, *more)


def test_a_resumed_run_has_the_same_bytes(trained, images, vit_file):
    resumed = trained.parent / "resumed"
    resumed.mkdir()
    names = sorted(name for name in os.listdir(trained) if name.startswith("checkpoint"))
    shutil.copy(trained / names[0], resumed / names[0])
    output = train(images, vit_file, resumed, "--epochs", 2, "--resume", "auto")
    assert "resuming from" in output
    whole, again = (torch.load(folder / "last.pth.tar", weights_only=True) for folder in (trained, resumed))
    assert whole["epoch"] == again["epoch"] == 2
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name


def test_the_log_says_which_images_the_teacher_gets(trained):
    [record] = of_kind(trained, "teacher")
    assert record["arch"] == VIT
    images = "its images: mean and deviation (0.5, 0.5, 0.5) and (0.5, 0.5, 0.5), 160 x 160 pixels"
    assert f"{images}\n" in (trained / "log.txt").read_text()
    assert [record["knn"] > 0 for record in of_kind(trained, "knn")] == [True]


def test_job_linear_trains_evaluates_and_finds_neighbours(trained, images, tmp_path):
    options = ["--pretrained", trained / "last.pth.tar", "--batch-size", 8, "-j", 0, "--out", tmp_path / "linear"]
    assert "best top-1" in program("job.linear", images, *options, "--epochs", 1, "--schedule", 9)
    evaluated = program("job.linear", images, "--evaluate", "--resume", tmp_path / "linear" / "last.pth.tar", "-j", 0)
    assert "validation on" in evaluated
    neighbours = program("job.linear", images, "--knn", *options[:-1], tmp_path / "knn")
    assert "k-NN accuracy" in neighbours and f"frozen: {MOBILE} from" in neighbours


def test_a_classifier_keeps_what_the_network_demands_of_its_images(images, vit_file, tmp_path):
    """Its mean, deviation and size are timm's, and evaluated again it has the same accuracy."""
    options = ["--pretrained", vit_file, "-a", VIT, "--batch-size", 8, "-j", 0, "--out", tmp_path / "linear"]
    trained = program("job.linear", images, *options, "--epochs", 1, "--schedule", 9)
    again = program("job.linear", images, "--evaluate", "--resume", tmp_path / "linear" / "last.pth.tar", "-j", 0)
    first, second = (re.search(r"validation on .*", text)[0] for text in (trained, again))
    assert first == second
    saved = torch.load(tmp_path / "linear" / "last.pth.tar", weights_only=True)
    assert saved["input"] == {"image_size": 160, "mean": [0.5] * 3, "std": [0.5] * 3}


@torch.no_grad()
def test_job_embed_writes_the_features_of_timm(trained, vit_file, images, tmp_path):
    """Of a student as they are; of a file with timm's own mean and size."""
    program("job.embed", images, "--pretrained", trained / "last.pth.tar", "--out", tmp_path / "a.npy", "-j", 0)
    assert np.load(tmp_path / "a.npy").shape == (59, 1024)
    program("job.embed", images, "--pretrained", vit_file, "-a", VIT, "--out", tmp_path / "b.npy", "-j", 0)
    about = json.loads((tmp_path / "b.json").read_text())
    assert about["image_size"] == 160 and about["input"]["mean"] == [0.5, 0.5, 0.5]
    assert np.load(tmp_path / "b.npy").shape == (59, 64)


def test_a_report_shows_what_the_student_sees(trained, images, tmp_path):
    program("job.show.report", trained, "--out", tmp_path / "report.html")
    assert MOBILE in (tmp_path / "report.html").read_text()
    names = [picture.name for picture in (tmp_path / "report-pictures").iterdir()]
    assert any("neighbours" in name for name in names), names


def test_a_pair_that_does_not_fit_ends_before_a_file_is_written(images, vit_file, tmp_path):
    command = [images, *SMALL, "-a", MOBILE, "--teacher", vit_file, "--teacher-arch", VIT, "--out", tmp_path / "run"]
    [message] = errors_of("job.train", [[*command, "--distill", "mgd"]])
    assert "--distill mgd needs maps of equal size" in message and "This pair fits simreg, similarity" in message
    assert not (tmp_path / "run").exists()
