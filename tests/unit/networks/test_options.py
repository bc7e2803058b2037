"""The options of networks other than torchvision's ResNets."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from errors import refused
from job import cli
from job.config import Config, LinearConfig, read_config
from job.embed import EmbedConfig
from job.engine.sync_norm import SynchronisedNorm
from job.evaluate.classifier import check_first_layer
from job.metrics import collapse
from job.networks import build_resnet
from job.resume import check_same, fixed

MOBILE, VIT = "timm/mobilenetv3_small_050", "timm/test_vit"


def read(text, program="job.train", kind=Config):
    return read_config(text.split(), program, kind)


@pytest.mark.parametrize("arch", [MOBILE, VIT, "timm/resnet18.a1_in1k", "package.module:function"])
def test_arch_accepts_any_network(arch):
    config = read(f"DIR -a {arch} --teacher t.pth --teacher-arch {arch}")
    assert (config.arch, config.teacher_arch) == (arch, arch)
    assert read(f"DIR -a {arch}", "job.linear", LinearConfig).arch == arch
    argv = f"DIR -a {arch} --pretrained x --out y.npy".split()
    assert cli.read("job.embed", EmbedConfig, argv)[0].arch == arch


def test_run_folder_has_no_slash_or_colon():
    assert Config(arch=MOBILE).folder() == "runs/timm-mobilenetv3_small_050"
    assert Config(arch="a.b:c").folder() == "runs/a.b-c"
    assert LinearConfig(arch=MOBILE).folder() == "runs/timm-mobilenetv3_small_050-linear"


@pytest.mark.parametrize("option", ["--stem small", "--width 32", "--zero-init-residual"])
def test_stem_and_width_are_for_resnets(option):
    reason = f"on {MOBILE}, which is not a ResNet of torchvision; leave it out"
    assert refused(read, f"DIR -a {MOBILE} {option}") == f"{option}: no effect {reason}"
    read(f"DIR -a resnet18 {option}")


def test_stem_in_a_file_allows_other_networks(tmp_path):
    (tmp_path / "a.yaml").write_text("stem: small\n")
    assert read(f"DIR --config {tmp_path}/a.yaml -a {MOBILE}").stem == "small"


@pytest.mark.parametrize("name", ["stem", "width"])
def test_linear_stem_is_for_resnets(name):
    value = {"stem": "small", "width": 32}[name]
    message = refused(check_first_layer, LinearConfig(**{name: value}), MOBILE)
    assert message.startswith(f"--{name}: no effect on {MOBILE}")
    check_first_layer(LinearConfig(**{name: value}), "resnet18")


@pytest.mark.parametrize(
    ("arch", "demands"), [(VIT, True), (MOBILE, False), ("resnet18", False), ("a:b", False)]
)
def test_resume_refuses_another_size_of_a_vit(arch, demands):
    names = fixed(Config(arch=arch), within_epoch=False)
    assert ("image_size" in names) == demands
    old, now = {"image_size": 32}, Config(arch=arch, image_size=64)
    if demands:
        assert "--image-size 64: here has 32" in refused(
            check_same, ["image_size"], old, now, "here"
        )


def test_resume_refuses_another_teacher_size():
    config = Config(teacher="t.pth", teacher_size=96)
    assert "teacher_size" in fixed(config, within_epoch=False)
    assert "teacher_size" not in fixed(Config(), within_epoch=False)
    for old, has in (({"teacher_size": 64}, 64), ({}, 0)):  # older runs do not have it
        message = refused(check_same, ["teacher_size"], old, config, "here")
        assert message.startswith(f"--teacher-size 96: here has {has}; ")


def test_sync_norm_keeps_timm_s_activation():
    """timm's norm of a MobileNet has its activation inside."""
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    plain = BatchNormAct2d(5, act_layer=nn.Hardswish).train()
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    ours = BatchNormAct2d(5, act_layer=nn.Hardswish)
    ours.load_state_dict(plain.state_dict())
    ours = SynchronisedNorm(ours, "norm").train()
    maps = torch.randn(4, 5, 3, 3)
    for _ in range(2):
        inputs = [maps.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(x) for norm, x in zip((plain, ours), inputs, strict=True)]
        for output in outputs:
            (output * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert list(ours.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    torch.testing.assert_close(ours.eval()(maps), plain.eval()(maps))


def test_dead_channels_need_a_relu():
    from job.frameworks.base import rectified

    features = {"layer4": torch.zeros(1)}
    assert rectified(SimpleNamespace(arch="resnet18"), features) is features
    assert rectified(SimpleNamespace(arch=MOBILE), features) == {}


def test_build_resnet_refuses_other_networks():
    assert refused(build_resnet, MOBILE).startswith(f"{MOBILE}: expected a ResNet of torchvision")


def test_log_omits_dead_channels_without_a_relu():
    assert collapse.describe({"feature_std": 0.9}) == "spread 0.90 (0: all alike, 1: even)"
    assert collapse.describe({"feature_std": 0.9, "dead_layer4": 0.5}).endswith(
        "dead channels 50 % of layer4"
    )
