"""Networks read from foreign files: names, shapes, values, and errors."""

import functools
import hashlib
import os

import pytest
import torch
from torch import nn
from torchvision import models

from job.checkpoints import foreign_file
from job.errors import RunError
from job.checkpoints.foreign_file import RELEASED
from job.checkpoints.foreign import is_moco, read_backbone
from job.networks import build_resnet

DIM = 16


@functools.cache
def shapes(build, *arguments):
    """Return the shapes and dtypes of a network's tensors, by name."""
    with torch.device("meta"):
        return {
            key: (value.shape, value.dtype) for key, value in build(*arguments).state_dict().items()
        }


def filled(shapes, seed=0):
    """Return tensors of these shapes. Each repeats one stored number, so files are small."""
    torch.manual_seed(seed)
    return {key: torch.rand(()).to(dtype).expand(shape) for key, (shape, dtype) in shapes.items()}


def state(arch="resnet18", mlp=True, stem="imagenet", seed=0):
    return filled(shapes(build_resnet, arch, DIM, mlp, stem), seed)


def torchvision_state(arch="resnet18"):
    return filled(shapes(getattr(models, arch)))


def moco_content(arch="resnet18", mlp=True, stem="imagenet", prefix="module.", **more):
    """Return the content of MoCo's own checkpoints."""
    query, key = state(arch, mlp, stem), state(arch, mlp, stem, seed=1)
    named = {f"{prefix}encoder_q.{name}": value for name, value in query.items()}
    named |= {f"{prefix}encoder_k.{name}": value for name, value in key.items()}
    named |= {
        f"{prefix}queue": torch.ones(DIM, 8),
        f"{prefix}queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    return {
        "epoch": 200,
        "arch": arch,
        "state_dict": named,
        "optimizer": {"state": {}, "param_groups": []},
        **more,
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes a checkpoint file and returns its path."""

    def written(content, name="teacher.pth.tar", legacy=False):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        return str(tmp_path / name)

    return written


def refused(path, arch=""):
    with pytest.raises(RunError) as caught:
        read_backbone(path, arch)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message
    assert caught.value.code == 2
    return message


def body(tensors):
    """Return a network's tensors without its head."""
    return {key: value for key, value in tensors.items() if not key.startswith("fc.")}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("mlp", "head"), [(False, 2), (True, 4)], ids=["v1", "v2"])
def test_moco_query_encoder_is_read(write, legacy, mlp, head):
    path = write(moco_content(mlp=mlp), legacy=legacy)
    backbone = read_backbone(path)
    assert (backbone.arch, backbone.stem) == ("resnet18", "imagenet")
    assert_same(backbone.state, body(state(mlp=mlp)))
    assert "\n" not in backbone.report
    for text in (
        path,
        "resnet18",
        "120 tensors",
        "module.encoder_q.",
        f"{120 + head} of encoder_k, {head} of fc, 2 others",
    ):
        assert text in backbone.report


def test_own_checkpoint_is_read(write):
    more = {
        "step": 0,
        "mgd": {"1.margin": torch.ones(3)},
        "config": {"arch": "resnet18"},
        "workers": 2,
        "format": 1,
    }
    content = moco_content(stem="small", **more)
    backbone = read_backbone(write(content))
    assert (backbone.arch, backbone.stem) == ("resnet18", "small")
    assert_same(backbone.state, body(state(stem="small")))


@pytest.mark.parametrize(
    ("arch", "width", "stem"), [("resnet18", 16, "small"), ("resnet50", 32, "imagenet")]
)
@pytest.mark.parametrize("named", [True, False])
def test_width_is_detected(write, arch, width, stem, named):
    tensors = filled(shapes(build_resnet, arch, 16, True, stem, width))
    content = {"state_dict": {f"module.encoder_q.{key}": v for key, v in tensors.items()}}
    backbone = read_backbone(write(content | {"arch": arch} if named else content))
    assert (backbone.arch, backbone.stem, backbone.width) == (arch, stem, width)
    assert_same(backbone.state, body(tensors))


def test_stem_of_two_widths_is_refused(write):
    content = moco_content()
    content["state_dict"]["module.encoder_q.conv1.weight"] = torch.ones(32, 3, 7, 7)
    with pytest.raises(
        RunError, match=r"conv1.weight is \(32, 3, 7, 7\), expected \(64, 3, 7, 7\): use another"
    ):
        read_backbone(write(content))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torchvision_weights_are_read(write, wrapped, legacy):
    tensors = torchvision_state()
    backbone = read_backbone(write({"state_dict": tensors} if wrapped else tensors, legacy=legacy))
    assert backbone.arch == "resnet18"
    assert_same(backbone.state, body(tensors))
    assert f"(layout: named layers{' in state_dict' * wrapped})" in backbone.report
    assert backbone.report.endswith("not needed, so ignored: 2 of fc (head: linear 512-1000)")


def test_moco_without_module_prefix_is_read(write):
    backbone = read_backbone(write(moco_content(prefix="")))
    assert_same(backbone.state, body(state()))
    assert "under encoder_q." in backbone.report


def test_backbone_computes_the_same_features(write):
    torch.manual_seed(0)
    source = models.resnet18(num_classes=10).eval()
    content = {
        "arch": "resnet18",
        "state_dict": {f"module.encoder_q.{k}": v for k, v in source.state_dict().items()},
    }
    backbone = read_backbone(write(content))
    net = build_resnet(backbone.arch, stem=backbone.stem).eval()
    missing, unexpected = net.load_state_dict(backbone.state, strict=False)
    assert all(key.startswith("fc.") for key in missing)
    assert unexpected == []
    source.fc = net.fc = nn.Identity()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(images), source(images))


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "wide_resnet50_2"])
def test_arch_is_detected_by_shapes(write, arch):
    assert read_backbone(write(torchvision_state(arch))).arch == arch


@pytest.mark.parametrize("name", [None, "my_net", 50, ["resnet50"]])
def test_unknown_arch_is_detected_by_shapes(write, name):
    assert (
        read_backbone(write({"state_dict": torchvision_state(), "arch": name})).arch == "resnet18"
    )


def test_counters_can_be_missing(write):
    content = moco_content()
    digest = read_backbone(write(content)).digest
    content["state_dict"] = {
        key: v
        for key, v in content["state_dict"].items()
        if not key.endswith("num_batches_tracked")
    }
    backbone = read_backbone(write(content))
    assert len(backbone.state) == 100
    assert backbone.digest == digest
    assert backbone.arch == "resnet18"


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_other_arch_is_refused(write, arch):
    message = refused(write(moco_content()), arch)
    assert f"does not fit {arch}" in message
    assert "another --teacher-arch" in message
    assert "more" in message  # than three misfits


def test_error_names_the_caller_s_option(write):
    path = write(moco_content())
    with pytest.raises(RunError, match="another --arch, or another file"):
        read_backbone(path, "resnet34", arch_flag="--arch")


def test_wrong_arch_in_file_is_refused(write):
    content = moco_content()
    content["arch"] = "resnet50"
    assert "does not fit resnet50" in refused(write(content))


def changed(change):
    """Return a MoCo checkpoint whose query encoder has changed."""
    content = moco_content()
    prefix = "module.encoder_q."
    tensors = {
        key.removeprefix(prefix): v
        for key, v in content["state_dict"].items()
        if key.startswith(prefix)
    }
    others = {key: v for key, v in content["state_dict"].items() if not key.startswith(prefix)}
    change(tensors)
    content["state_dict"] = others | {prefix + key: v for key, v in tensors.items()}
    return content


NAME = "layer2.0.conv1.weight"


def put(value):
    return lambda tensors: tensors.update({NAME: value})


NOT_FINITE = torch.zeros(128, 64, 3, 3)
NOT_FINITE[3, 2, 1, 0] = float("nan")

MISFITS = [
    ("missing", lambda tensors: tensors.pop(NAME), [NAME, "is missing"]),
    (
        "extra",
        lambda tensors: tensors.update({"layer2.7.conv1.weight": torch.ones(3)}),
        ["layer2.7.conv1.weight", "is unexpected"],
    ),
    ("shape", put(torch.ones(128, 64, 1, 1)), [NAME, "(128, 64, 1, 1)", "(128, 64, 3, 3)"]),
    (
        "no statistics",
        lambda tensors: tensors.pop("bn1.running_mean"),
        ["bn1.running_mean", "is missing"],
    ),
    ("integers", put(torch.ones(128, 64, 3, 3, dtype=torch.int8)), [NAME, "int8"]),
    ("sparse", put(torch.ones(128, 64, 3, 3).to_sparse()), [NAME, "sparse_coo", "dense"]),
    ("no values", put(torch.ones(128, 64, 3, 3, device="meta")), [NAME, "without values", "dense"]),
    ("nan", put(NOT_FINITE), [NAME, "not finite"]),
    ("inf", put(torch.full((128, 64, 3, 3), float("inf"))), [NAME, "not finite"]),
]


@pytest.mark.parametrize(
    ("change", "texts"), [case[1:] for case in MISFITS], ids=[case[0] for case in MISFITS]
)
def test_misfit_names_the_tensor(write, change, texts):
    message = refused(write(changed(change)))
    assert all(text in message for text in texts), message


def test_misfit_names_the_nearest_arch(write):
    content = changed(lambda tensors: tensors.pop(NAME))
    del content["arch"]
    message = refused(write(content))
    assert "--teacher-arch" in message
    assert "fits no ResNet (resnet18 is the nearest)" in message
    assert NAME in message


def test_head_can_be_not_finite(write):
    assert read_backbone(
        write(
            changed(lambda tensors: tensors.update({"fc.0.bias": torch.full((512,), float("nan"))}))
        )
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "no network"),
        ({"epoch": 3}, "no network"),
        ({"state_dict": {}}, "no network"),
        ({"state_dict": [1, 2]}, "no network"),
        ({"state_dict": {"a": 1}}, "no network"),
        ({"w": torch.ones(2)}, "w"),
        (
            {"module.conv1.weight": torch.ones(64, 3, 7, 7)},
            "{'module.conv1.weight': a tensor (64, 3, 7, 7)}",
        ),
        ({"state_dict": {"features.0.weight": torch.ones(64, 3, 11, 11)}}, "features.0.weight"),
        (
            {"state_dict": {"module.encoder_k.conv1.weight": torch.ones(64, 3, 7, 7)}},
            "module.encoder_k.conv1.weight",
        ),
    ],
    ids=str,
)
def test_file_without_network_is_refused(write, content, expected):
    assert expected in refused(write(content))


@pytest.mark.parametrize(
    "content",
    [
        {"conv1.weight": 3, "w": torch.ones(2)},
        {"conv1.weight": torch.ones(()), "w": torch.ones(2)},
        {"conv1.weight": torch.ones(64, 3, 7, 7), 5: torch.ones(2)},
        {"arch": "resnet18", "state_dict": {**torchvision_state(), "bn1.bias": [0.0] * 64}},
    ],
    ids=["a number", "no shape", "a number for a name", "a list"],
)
def test_values_other_than_tensors_are_refused(write, content):
    refused(write(content))


@pytest.mark.parametrize("made", ["missing", "text", "cut"])
def test_incomplete_file_is_refused(write, tmp_path, made):
    path = str(tmp_path / "teacher.pth.tar")
    if made == "text":
        (tmp_path / "teacher.pth.tar").write_text("<!DOCTYPE html>\n")
    if made == "cut":
        write(moco_content())
        data = (tmp_path / "teacher.pth.tar").read_bytes()
        (tmp_path / "teacher.pth.tar").write_bytes(data[: len(data) // 2])
    refused(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>': download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n", "is not a checkpoint"),
    ],
)
def test_file_in_other_format_is_refused(tmp_path, content, expected):
    (tmp_path / "teacher.pth.tar").write_bytes(content)
    assert expected in refused(str(tmp_path / "teacher.pth.tar"))


@pytest.mark.parametrize(
    ("make", "expected"), [(os.mkdir, "is a folder"), (os.mkfifo, "not a regular file")]
)
def test_path_without_file_is_refused(tmp_path, make, expected):
    make(tmp_path / "teacher")
    assert expected in refused(str(tmp_path / "teacher"))


def test_released_md5_sums():
    assert RELEASED == {
        "moco_v1_200ep_pretrain.pth.tar": "b251726a",
        "moco_v2_200ep_pretrain.pth.tar": "59fd9945",
        "moco_v2_800ep_pretrain.pth.tar": "a04e12f8",
    }


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_released_name_with_other_md5_is_refused(write, name):
    path = write(moco_content("resnet50"), name)
    with open(path, "rb") as file:
        md5 = hashlib.md5(file.read()).hexdigest()[:8]
    message = refused(path)
    assert RELEASED[name] in message
    assert md5 in message
    assert "download it again" in message


def test_released_name_with_its_md5_is_read(write, monkeypatch):
    name = "moco_v2_200ep_pretrain.pth.tar"
    path = write(moco_content(), name)
    with open(path, "rb") as file:
        monkeypatch.setitem(foreign_file.RELEASED, name, hashlib.md5(file.read()).hexdigest()[:8])
    assert read_backbone(path).arch == "resnet18"


def test_released_name_can_be_missing(tmp_path):
    assert "no such file" in refused(str(tmp_path / "moco_v2_200ep_pretrain.pth.tar"))


@pytest.mark.parametrize(
    ("content", "is_one"),
    [
        ({"state_dict": {"module.encoder_q.conv1.weight": 0}}, True),
        ({"state_dict": {"encoder_q.conv1.weight": 0, "queue": 0}}, True),
        ({"state_dict": {"conv1.weight": 0}}, False),
        ({"state_dict": {}}, False),
        ({"state_dict": None}, False),
        ({"encoder_q.conv1.weight": 0}, False),
        ({}, False),
    ],
)
def test_is_moco_finds_the_query_encoder(content, is_one):
    assert is_moco(content) is is_one
