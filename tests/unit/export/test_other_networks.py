"""Networks of timm and of users as files of other programs."""

import dataclasses
import json
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from errors import refused
from job.config import Config
from job.data.augment import MEAN, STD
from job.export.app import export
from job.networks import build_network, with_features

MOBILE, VIT = "timm/mobilenetv3_small_050", "timm/test_vit"
SIZE = 32  # pixels
SOURCE = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture(autouse=True)
def users_module(tmp_path, monkeypatch):
    """A user's own network, net_of_export:build."""
    (tmp_path / "net_of_export.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("net_of_export", None)


def write_checkpoint(path, arch):
    """Write a run's checkpoint; return its student's features of images (3, 3, SIZE, SIZE)."""
    torch.manual_seed(4)
    net = build_network(arch, image_size=SIZE)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {f"module.encoder_q.{name}": value for name, value in net.state_dict().items()}
    config = dataclasses.asdict(Config(arch=arch, image_size=SIZE, data="images"))
    content = {"state_dict": state, "arch": arch, "epoch": 3, "config": config, "format": 1}
    torch.save(content, path)
    with torch.no_grad():
        return with_features(net.eval(), [], "flatten")(images())["flatten"]


def images():
    """Normalised images."""
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", [MOBILE, VIT])
def test_timm_loads_its_networks(arch, tmp_path):
    expected = write_checkpoint(tmp_path / "run.pth.tar", arch)
    report = export(str(tmp_path / "run.pth.tar"), str(tmp_path / "model.safetensors"))
    [statement] = [part for part in report.split("load it with: ") if part.startswith("net = ")]
    found = {"timm": timm}
    exec(statement, found)
    folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for net in (found["net"], folder):
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(images()), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == arch.removeprefix("timm/")
    pixels = config["pretrained_cfg"]
    assert (pixels["mean"], pixels["std"]) == ([*MEAN], [*STD])
    assert pixels["input_size"] == [3, SIZE, SIZE]
    assert pixels["fixed_input_size"] is (arch == VIT)


@pytest.mark.parametrize("arch", [MOBILE, VIT, "net_of_export:build"])
def test_onnxruntime_computes_the_same_features(arch, tmp_path):
    expected = write_checkpoint(tmp_path / "run.pth.tar", arch)
    export(str(tmp_path / "run.pth.tar"), str(tmp_path / "model.onnx"), arch=arch)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    [found] = session.run(None, {"images": images().numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    shape = session.get_inputs()[0].shape
    assert (shape[2:] == [SIZE, SIZE]) is (arch == VIT)


def test_a_user_s_network_is_a_state_dict(tmp_path):
    expected = write_checkpoint(tmp_path / "run.pth.tar", "net_of_export:build")
    path = str(tmp_path / "model.pth")
    report = export(str(tmp_path / "run.pth.tar"), path, arch="net_of_export:build")
    found = {"torch": torch, "net_of_export": __import__("net_of_export")}
    exec(report.split("load it with: ")[1], found)
    with torch.no_grad():
        torch.testing.assert_close(found["net"].eval()(images()), expected)


@pytest.mark.parametrize(
    ("arch", "name", "expected"),
    [
        (MOBILE, "a.pth", f"torchvision has no network {MOBILE}: use timm or onnx"),
        (VIT, "a.pkl", f"detectron2 has no network {VIT}: use onnx"),
        ("net_of_export:build", "a.safetensors", "use onnx, or a file .pth"),
    ],
)
def test_formats_that_cannot_hold_a_network(arch, name, expected, tmp_path):
    write_checkpoint(tmp_path / "run.pth.tar", arch)
    text = refused(export, str(tmp_path / "run.pth.tar"), str(tmp_path / name), arch=arch)
    assert expected in text
    assert not (tmp_path / name).exists()
