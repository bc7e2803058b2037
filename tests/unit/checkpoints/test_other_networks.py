"""Files with networks of timm and of a user, and the images that they need."""

import functools
import json
import math
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from errors import refused
from job.checkpoints import other_networks
from job.checkpoints.foreign import read_backbone
from job.cluster import comm, objects
from job.data.augment import MEAN, STD
from job.frameworks.moco import build_moco
from job.networks import build_network, with_features

VIT, MOBILE, NEXT = (
    f"timm/{name}" for name in ("test_vit", "mobilenetv3_small_050", "test_convnext")
)
OWN = 160  # pixels, the size of VIT's images in timm's configuration


@functools.cache
def plain(arch, size=0):
    """Return a network of timm with a classifier, and with random running statistics."""
    torch.manual_seed(2)
    more = {"img_size": size} if size else {}
    net = timm.create_model(arch.removeprefix("timm/"), num_classes=3, **more).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def pixels(size):
    """Return images of colours in [0, 1], (2, 3, size, size)."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def coloured(images, mean, std):
    """Return images normalised by a mean and a deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


def pooled(net, images):
    """Return timm's pooled features (b, C) of images."""
    return net.forward_head(net.forward_features(images), pre_logits=True)


@torch.no_grad()
def features(weights, images):
    """Return this program's pooled features (b, C) of images in [0, 1]."""
    net = with_features(weights.build().eval(), [], "flatten")
    return net(coloured(images, MEAN, STD))["flatten"]


def write(path, arch, content=None):
    state = plain(arch).state_dict()
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(content or state, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("file", ["a.safetensors", "pytorch_model.bin", "a.pth"])
@pytest.mark.parametrize("arch", [VIT, MOBILE, NEXT])
def test_features_equal_timm_s(tmp_path, arch, file):
    """Mean and deviation are timm's, and so is the size if the network needs one."""
    weights = read_backbone(write(tmp_path / file, arch), arch)
    assert weights.arch == arch and weights.head == "none"
    ignored = weights.report.partition("none missing; not needed, so ignored: ")[2]
    assert ignored.startswith(("2 of ", "nothing"))
    own = (0.5, 0.5, 0.5) if arch in (VIT, NEXT) else None
    mean, std = (own or MEAN), (own or STD)
    assert (weights.mean, weights.std, weights.image_size) == (mean, std, OWN if arch == VIT else 0)
    images = pixels(OWN)
    expected = pooled(plain(arch), coloured(images, mean, std))
    torch.testing.assert_close(features(weights, images), expected, rtol=1e-4, atol=1e-4)
    assert not weights.build().state_dict().keys() & {"input.scale", "input.shift"}


def test_images_are_resized(tmp_path):
    weights = read_backbone(write(tmp_path / "a.pth", VIT), VIT)
    small = pixels(40)
    large = torch.nn.functional.interpolate(small, (OWN, OWN), mode="bilinear", antialias=True)
    torch.testing.assert_close(
        features(weights, small), features(weights, large), rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 96])
def test_size_resamples_positions_as_timm(tmp_path, size):
    path = write(tmp_path / "a.pth", VIT)
    weights = read_backbone(path, VIT, size=size)
    assert weights.image_size == size and f", {size} x {size} pixels" in weights.report
    images, file = pixels(size), {"file": path, "num_classes": 3}
    options = dict(num_classes=3, img_size=size, pretrained_cfg_overlay=file)
    net = timm.create_model(VIT.removeprefix("timm/"), pretrained=True, **options).eval()
    expected = pooled(net, coloured(images, weights.mean, weights.std))
    torch.testing.assert_close(features(weights, images), expected, rtol=1e-4, atol=1e-4)
    assert features(weights, pixels(40)).shape == expected.shape


def test_size_of_own_checkpoint(tmp_path):
    torch.save(ours(VIT)[1], tmp_path / "a.pth")
    weights = read_backbone(str(tmp_path / "a.pth"), size=64)
    assert weights.image_size == 64 and weights.state["body.pos_embed"].shape == (1, 17, 64)
    assert features(weights, pixels(32)).shape == (2, 64)


@torch.no_grad()
def test_size_of_cnn_resizes_images(tmp_path):
    path = write(tmp_path / "a.pth", MOBILE)
    small = pixels(40)
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", antialias=True)
    actual = features(read_backbone(path, MOBILE, size=64), small)
    expected = features(read_backbone(path, MOBILE), large)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


PATCHED = "--teacher-size {}: expected a multiple of 16, the side of the patches of timm/test_vit. "
SIZES = {
    (VIT, 40): PATCHED.format(40) + "Choose 32 or 48",
    (VIT, 12): PATCHED.format(12) + "Choose 16",
    (VIT, 4): "--teacher-size 4: expected 8 to 4096 pixels, or 0. Choose another",
    (MOBILE, 5000): "--teacher-size 5000: expected 8 to 4096 pixels, or 0. Choose another",
    ("resnet18", 64): "--teacher-size 64: no effect on torchvision's ResNet, which gets the ",
}


@pytest.mark.parametrize(("arch", "size"), SIZES)
def test_size_is_refused(tmp_path, arch, size):
    if arch == "resnet18":
        path = str(tmp_path / "a.pth")
        torch.save(build_network(arch).state_dict(), path)
    else:
        path = write(tmp_path / "a.pth", arch)
    message = refused(read_backbone, path, arch, size=size)
    assert message.startswith(SIZES[arch, size])


def test_size_is_blamed_only_for_its_networks(tmp_path):
    path = write(tmp_path / "a.pth", MOBILE)
    assert "name its network, as --teacher-arch timm/NAME" in refused(read_backbone, path, size=64)
    assert "leave out --teacher-size" not in refused(read_backbone, path, NEXT, size=64)
    assert "leave out --teacher-size" in refused(read_backbone, path, VIT, size=64)


def test_size_that_timm_does_not_resize_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pth", VIT)
    build = other_networks.timm_networks.build_with_filter
    monkeypatch.setattr(
        other_networks.timm_networks,
        "build_with_filter",
        lambda arch, size: (build(arch, size)[0], None),
    )
    message = refused(read_backbone, path, VIT, size=32)
    assert "pos_embed is (1, 101, 64), expected (1, 5, 64)" in message
    fix = "leave out --teacher-size, use another --teacher-arch, or another file"
    assert message.endswith(f": {fix}")


def test_size_that_timm_cannot_build_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pth", VIT)

    def fail(arch, size):
        raise AssertionError(f"window of {size}")

    monkeypatch.setattr(other_networks.timm_networks, "build_with_filter", fail)
    message = refused(read_backbone, path, VIT, size=32)
    expected = "cannot process 32 x 32 pixels: window of 32. Choose another --teacher-size"
    assert message == f"{VIT} {expected}"


def test_timm_translates_other_programs(tmp_path):
    """DINOv2's files have a mask token, and positions for another number of patches."""
    state = dict(plain(VIT).state_dict()) | {"mask_token": torch.zeros(1, 64)}
    rows = torch.arange(0.5, 20) / 20  # of positions in the image
    finer = (rows[:, None] + 2 * rows).expand(64, 20, 20).flatten(1).T  # (20 x 20, 64)
    state["pos_embed"] = torch.cat([state["pos_embed"][0, :1], finer])[None]
    torch.save(state, tmp_path / "dinov2.pth")
    weights = read_backbone(str(tmp_path / "dinov2.pth"), VIT)
    actual = weights.state["body.pos_embed"]
    assert actual.shape == plain(VIT).pos_embed.shape
    own = torch.arange(0.5, 10) / 10
    expected = (own[:, None] + 2 * own).expand(64, 10, 10).flatten(1).T
    torch.testing.assert_close(actual[0, 1:], expected, atol=0.03, rtol=0)
    assert not any("mask" in name for name in weights.state)


def ours(arch, size=32, **more):
    """Return MoCo and its checkpoint, whose key encoder differs from the query encoder."""
    torch.manual_seed(3)
    moco = build_moco(comm, arch, dim=6, K=4, mlp=True, stages=[4], image_size=size)
    for value in moco.encoder_k.parameters():
        value.fill_(9.0)
    state = {f"module.{name}": value for name, value in moco.state_dict().items()}
    config = {"image_size": size, "arch": arch}
    state = dict(reversed(state.items()))  # the key encoder first
    return moco, {
        "arch": arch,
        "format": 3,
        "epoch": 2,
        "config": config,
        "state_dict": state,
        **more,
    }


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("arch", [VIT, MOBILE])
def test_own_checkpoint_needs_no_arch(tmp_path, arch, named):
    """It has the query encoder's features, ImageNet's mean, and its head."""
    moco, content = ours(arch)
    torch.save(content, tmp_path / "last.pth.tar")
    weights = read_backbone(str(tmp_path / "last.pth.tar"), arch if named else "")
    assert (weights.mean, weights.std) == (MEAN, STD) and weights.meta["epoch"] == 2
    assert weights.image_size == (32 if arch == VIT else 0)
    width = 64 if arch == VIT else 1024
    assert weights.head == f"mlp {width}-{width}-6" and set(weights.head_state) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    }
    assert "under module.encoder_q.body.* loaded" in weights.report and "4 of fc" in weights.report
    moco.eval()
    with torch.no_grad():
        expected = moco.encoder_q(coloured(pixels(32), MEAN, STD))
    torch.testing.assert_close(features(weights, pixels(32)), expected["pooled"])


def test_backbone_can_be_sent_to_workers(tmp_path):
    torch.save(ours(MOBILE)[1], tmp_path / "a.pth")
    weights = read_backbone(str(tmp_path / "a.pth"))
    actual = objects.decode(objects.encode(weights))
    assert (
        actual.digest == weights.digest and actual.mean == weights.mean and actual.image_size == 0
    )


def test_input_of_file_wins(tmp_path):
    """A classifier's checkpoint and an exported file have it."""
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.2]
    needs = {"image_size": 32, "mean": mean, "std": std}
    torch.save(ours(VIT, 32, input=needs)[1] | {"config": {"image_size": 48}}, tmp_path / "a.pth")
    weights = read_backbone(str(tmp_path / "a.pth"))
    assert weights.input == needs
    state = {name: value.contiguous() for name, value in plain(MOBILE).state_dict().items()}
    metadata = {"arch": MOBILE, "mean": json.dumps(mean), "std": json.dumps(std)}
    save_file(state, tmp_path / "a.safetensors", metadata)
    weights = read_backbone(str(tmp_path / "a.safetensors"))
    assert weights.arch == MOBILE and weights.input == needs | {"image_size": 0}


FUNCTION = "own_net:build"
SOURCE = """
from torch import nn

def build():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
"""


def test_file_never_runs_a_user_s_function(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    state = {
        "module.encoder_q.body.2.weight": torch.ones(5, 3),
        "module.encoder_q.body.2.bias": torch.ones(5),
    }
    torch.save(
        {"arch": FUNCTION, "format": 3, "config": {}, "state_dict": state}, tmp_path / "a.pth"
    )
    path = str(tmp_path / "a.pth")
    message = refused(read_backbone, path)
    assert f"a network of the function {FUNCTION}, and a file never runs code" in message
    assert message.endswith(f"give --teacher-arch {FUNCTION}") and "own_net" not in sys.modules
    message = refused(read_backbone, path, arch_flag="")
    assert message.endswith("a file never runs code; this program has no option that allows it")
    weights = read_backbone(path, FUNCTION)
    assert weights.state.keys() == {"body.2.weight", "body.2.bias"} and weights.image_size == 0
    sys.modules.pop("own_net")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def changed(state, name, change):
    return state | {name: change(state[name])}


WRONG = {  # changes of a MobileNetV3's tensors, and the error
    "missing": (lambda state: without(state, "conv_stem.weight"), "conv_stem.weight is missing"),
    "late": (lambda state: without(state, "conv_head.bias"), "conv_head.bias is missing"),
    "nan": (
        lambda state: changed(state, "conv_head.bias", lambda value: value * torch.nan),
        "conv_head.bias has values that are not finite",
    ),
    "integers": (
        lambda state: changed(state, "conv_head.bias", torch.Tensor.long),
        "is torch.int64, expected floats",
    ),
    "shape": (
        lambda state: changed(state, "conv_head.bias", lambda value: value[:-1]),
        "(1023,), expected (1024,)",
    ),
    "surplus": (
        lambda state: state | {"blocks.9.0.weight": torch.ones(1)},
        "blocks.9.0.weight is unexpected",
    ),
    "meta": (
        lambda state: changed(state, "conv_head.bias", lambda value: value.to("meta")),
        "conv_head.bias is missing",
    ),
    "empty": (lambda state: {"a": 1}, "has no tensors: found {'a': int}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_refused(tmp_path, case):
    change, cause = WRONG[case]
    path = write(tmp_path / "a.pth", MOBILE, change(dict(plain(MOBILE).state_dict())))
    message = refused(read_backbone, path, MOBILE, "--arch")
    assert cause in message and message.startswith(path)
    assert case == "empty" or message.endswith("use another --arch, or another file")


def test_file_of_other_network_is_refused(tmp_path):
    path = write(tmp_path / "a.pth", MOBILE)
    for arch in (VIT, NEXT):
        message = refused(read_backbone, path, arch)
        assert f"does not fit {arch}: " in message and "and " in message
    message = refused(read_backbone, path, VIT, arch_flag="")
    assert f"does not fit {VIT}: " in message and message.endswith(": use another file")
    message = refused(read_backbone, path, arch_flag="--arch")
    assert message.endswith(": use another file, or name its network, as --arch timm/NAME")


INVALID = [
    {"input": {"mean": [0.5, 0.5]}},
    {"input": {"mean": [0.5, 0.5, "x"]}},
    {"input": {"mean": [0.5, 0.5, math.nan]}},
    {"input": {"mean": [0.5, 0.5, -math.inf]}},
    {"input": {"std": [0.5, 0.5, 0.0]}},
    {"input": {"std": [0.5, 0.5, -0.5]}},
    {"input": {"std": [0.5, 0.5, math.inf]}},
    {"input": {"std": [0.5, 0.5, math.nan]}},
    {"input": {"image_size": 10**9}},
    {"config": {"image_size": 4, "arch": VIT}},
    {"config": {"image_size": "32", "arch": VIT}},
]


@pytest.mark.parametrize("change", INVALID, ids=str)
def test_invalid_input_is_refused(tmp_path, change):
    torch.save(ours(VIT)[1] | change, tmp_path / "a.pth")
    assert "invalid input" in refused(read_backbone, str(tmp_path / "a.pth"))


def test_arch_never_reaches_a_hub(tmp_path):
    """timm would read names of hubs and folders."""
    torch.save(ours(VIT)[1], tmp_path / "a.pth")
    for name in ("timm/hf-hub:someone/net", "timm/local-dir:/tmp"):
        assert "no network of timm" in refused(read_backbone, str(tmp_path / "a.pth"), name)
        assert "no network of timm" in refused(build_network, name)


def test_unknown_arch_in_file_is_refused(tmp_path):
    torch.save(ours(VIT)[1] | {"arch": "timm/test_vitt"}, tmp_path / "a.pth")
    message = refused(read_backbone, str(tmp_path / "a.pth"))
    assert "a.pth: arch 'timm/test_vitt': no network of timm" in message
