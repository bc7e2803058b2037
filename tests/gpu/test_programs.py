"""job.linear, job.embed and job.export on the device, with a checkpoint trained on it."""

import json

import numpy as np
import pytest
import torch

from runs import of_kind

# On GPUs float32 convolutions use TF32 by default, whose rounding is 2**-11.
ALIKE = 0.999  # the least cosine between an image's features on GPU and CPU


@pytest.fixture(scope="module")
def trained(tmp_path_factory, network, images):
    from job.config import read_config
    from job.train import train

    out = tmp_path_factory.mktemp("trained") / "run"
    options = f"--epochs 1 --batch-size 16 --moco-k 64 -j 0 --knn-every 1 --out {out}".split()
    train(read_config([str(images), *network, *options]))
    return out / "last.pth.tar"


def test_knn_agrees_with_training(command, images, trained):
    output = command("linear", images, "--knn", "--pretrained", trained, "-j", 0)
    [knn] = of_kind(trained.parent, "knn")
    assert f"{knn['knn']:.2f}" in output, output


def test_linear_trains_and_evaluates(command, images, trained, tmp_path):
    options = [
        "--epochs",
        2,
        "--batch-size",
        16,
        "--lr",
        0.1,
        "-j",
        0,
        "--out",
        tmp_path / "linear",
    ]
    command("linear", images, "--pretrained", trained, *options)
    accuracy = of_kind(tmp_path / "linear", "validation")[-1]["val_top1"]
    best = tmp_path / "linear" / "last.pth.tar"
    output = command("linear", images, "--evaluate", "--resume", best, "-j", 0)
    assert f"{accuracy:.2f}" in output, output


def test_embed_equals_the_cpu_to_tf32(command, images, trained, tmp_path):
    features = {}
    for name, hidden in (("device", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        path = tmp_path / f"{name}.npy"
        options = ["--pretrained", trained, "-j", 0, "--out", path]
        command("embed", images, *options, **hidden)
        features[name] = np.load(path).astype(np.float64)
    assert json.loads((tmp_path / "device.json").read_text())
    products = (features["device"] * features["cpu"]).sum(1)
    norms = [np.linalg.norm(value, axis=1) for value in features.values()]
    assert (products / (norms[0] * norms[1])).min() >= ALIKE


def test_export_writes_the_student(command, trained, device, tmp_path):
    if device.type == "cpu":
        pytest.skip("the CPU's student is narrow: tests/runs/test_export.py exports wide ones")
    command("export", trained, tmp_path / "student.pth", "--no-card")
    exported = torch.load(tmp_path / "student.pth", map_location="cpu", weights_only=True)
    kept = torch.load(trained, map_location="cpu", weights_only=True)["state_dict"]
    name = "layer4.1.conv2.weight"
    assert torch.equal(exported[name], kept[f"module.encoder_q.{name}"])
