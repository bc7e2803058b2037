"""Networks of timm and of users as files of other programs."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import safetensors
import timm
import torch
from torch import nn

from errors import refused
from job.checkpoints import hub
from job.config import Config
from job.data.augment import MEAN, STD
from job.export import onnx
from job.export.app import export, main
from job.export.network import Network
from job.export.options import command
from job.export.origin import folders_of
from job.networks import build_network, with_features

MOBILE, VIT = "timm/mobilenetv3_small_050", "timm/test_vit"
SIZE = 32  # pixels
SOURCE = """
from torch import nn


def build():
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pool, nn.Flatten())
"""


@pytest.fixture(autouse=True)
def users_module(tmp_path, monkeypatch):
    """A user's own network, net_of_export:build."""
    (tmp_path / "net_of_export.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("net_of_export", None)


def write_checkpoint(path, arch):
    """Write a run's checkpoint. Return its student's features of images (3, 3, SIZE, SIZE)."""
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
    """Return normalised images."""
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", [MOBILE, VIT])
def test_timm_loads_its_networks(arch, tmp_path):
    expected = write_checkpoint(tmp_path / "run.pth.tar", arch)
    report = export(str(tmp_path / "run.pth.tar"), str(tmp_path / "model.safetensors"))
    [statement] = [part for part in report.split("load it with: ") if part.startswith("net = ")]
    namespace = {"timm": timm}
    exec(statement, namespace)
    folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for net in (namespace["net"], folder):
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(images()), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == arch.removeprefix("timm/")
    pixels = config["pretrained_cfg"]
    assert (pixels["mean"], pixels["std"]) == ([*MEAN], [*STD])
    assert pixels["input_size"] == [3, SIZE, SIZE]
    assert pixels["fixed_input_size"] is (arch == VIT)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [MOBILE, VIT, "net_of_export:build"])
def test_onnx_features_are_equal(arch, tmp_path):
    expected = write_checkpoint(tmp_path / "run.pth.tar", arch)
    export(str(tmp_path / "run.pth.tar"), str(tmp_path / "model.onnx"), arch=arch)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    [actual] = session.run(None, {"images": images().numpy()})
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    shape = session.get_inputs()[0].shape
    assert (shape[2:] == [SIZE, SIZE]) is (arch == VIT)


def test_own_network_is_a_state_dict(tmp_path):
    expected = write_checkpoint(tmp_path / "run.pth.tar", "net_of_export:build")
    path = str(tmp_path / "model.pth")
    report = export(str(tmp_path / "run.pth.tar"), path, arch="net_of_export:build")
    namespace = {"torch": torch, "net_of_export": __import__("net_of_export")}
    exec(report.split("load it with: ")[1], namespace)
    with torch.no_grad():
        torch.testing.assert_close(namespace["net"].eval()(images()), expected)


def test_card_and_origin_name_the_network(tmp_path):
    write_checkpoint(tmp_path / "run.pth.tar", MOBILE)
    export(str(tmp_path / "run.pth.tar"), str(tmp_path / "model.safetensors"))
    card = (tmp_path / "model.md").read_text()
    assert f"    arch: {MOBILE} (default: resnet18)\n" in card
    assert f"python -m job.train images --image-size {SIZE} --arch {MOBILE}\n" in card
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["arch"] == MOBILE


def test_command_keeps_names_with_slashes():
    config = Config(
        arch=MOBILE,
        teacher_arch=VIT,
        teacher="hub:timm/test_vit",
        log_to=["my.module:make"],
        data="/a/images",
        more_data=["/b/more"],
    )
    line = command(dataclasses.asdict(config), 1)
    for part in (
        f"--arch {MOBILE}",
        f"--teacher-arch {VIT}",
        "--teacher hub:timm/test_vit",
        "job.train images --more-data more",
    ):
        assert part in line
    assert "/a/" not in line and "/b/" not in line


def test_folders_of_is_the_run_s_data(tmp_path):
    assert folders_of({"data": "/a/images", "more_data": ["/b/more/"]}) == "images, more"
    assert folders_of({"data": "/a/images"}) == "images"


@pytest.mark.parametrize(
    ("arch", "name", "form"),
    [("net_of_export:build", "a.pth", "torchvision"), (VIT, "a.safetensors", "timm")],
)
def test_main_accepts_any_network(arch, name, form, tmp_path, capsys):
    write_checkpoint(tmp_path / "run.pth.tar", arch)
    main([str(tmp_path / "run.pth.tar"), str(tmp_path / name), "--arch", arch])
    assert f"{arch} of epoch 3 for {form}" in capsys.readouterr().out


def test_main_refuses_an_unknown_network(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "run.pth.tar"), str(tmp_path / "a.onnx"), "--arch", "vgg"])
    assert caught.value.code == 2 and "--arch 'vgg': " in capsys.readouterr().err


def test_hub_weights_are_exported(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "cached.pth", MOBILE)
    weights = hub.Weights(MOBILE, str(tmp_path / "cached.pth"), "0" * 64)
    monkeypatch.setattr(hub, "fetch", lambda name: weights)
    export(f"hub:{MOBILE}", str(tmp_path / "model.safetensors"))
    assert "cached.pth" in (tmp_path / "model.md").read_text()


def test_onnx_compares_only_possible_sizes(tmp_path):
    class Even(nn.Module):
        def forward(self, images):
            if images.shape[2] != images.shape[3]:
                raise RuntimeError("sizes")
            return images.mean((2, 3))

    network = Network(MOBILE, Even(), 3, MEAN, STD, SIZE)
    session = SimpleNamespace(run=lambda _, inputs: [inputs["images"].mean((2, 3))])
    assert onnx.compare(session, network) < 1e-6


@pytest.mark.parametrize(
    ("arch", "name", "expected"),
    [
        (
            MOBILE,
            "a.pth",
            f"torchvision has no network {MOBILE}. Choose OUTPUT.safetensors or OUTPUT.onnx",
        ),
        (VIT, "a.pkl", f"detectron2 has no network {VIT}. Choose OUTPUT.onnx"),
        ("net_of_export:build", "a.safetensors", "Choose OUTPUT.onnx or OUTPUT.pth"),
    ],
)
def test_formats_refuse_other_networks(arch, name, expected, tmp_path):
    write_checkpoint(tmp_path / "run.pth.tar", arch)
    text = refused(export, str(tmp_path / "run.pth.tar"), str(tmp_path / name), arch=arch)
    assert expected in text
    assert not (tmp_path / name).exists()
