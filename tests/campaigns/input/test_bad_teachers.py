"""Files for --teacher, --pretrained and job.export: other networks, damaged, hostile."""

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from cases import LINEAR, SMALL, Case, check
from job.networks import build_resnet
from short import short


class Harm:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def plain(net):
    """Return a network's state dict. All values of a tensor are one stored number: small files."""
    return {
        name: torch.full((), 0.02).to(value.dtype).expand(value.shape)
        for name, value in net.state_dict().items()
    }


def state(arch="resnet18", **options):
    """Return the state dict of a network of job.train, with MoCo's prefix."""
    return {
        f"module.encoder_q.{name}": value
        for name, value in plain(build_resnet(arch, **options)).items()
    }


def teacher(arch="resnet18", **changes):
    """Return the content of a MoCo checkpoint with changed tensors. None: the tensor is missing."""
    changed = {
        f"module.encoder_q.{name.replace('__', '.')}": value for name, value in changes.items()
    }
    return {
        "arch": arch,
        "state_dict": {k: v for k, v in (state(arch) | changed).items() if v is not None},
    }


def saved(content, **options):
    """Return a function that saves a content with torch."""
    return lambda path: torch.save(content(), path, **options)


def written(content):
    """Return a function that writes bytes."""
    return lambda path: path.write_bytes(content)


def cut(path):
    torch.save(teacher(), path)
    os.truncate(path, os.path.getsize(path) // 2)


def flipped(path):
    torch.save(teacher(), path)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(b"\xff" * 64)


def cut_safetensors(path):
    save_file(models.resnet18().state_dict(), path)
    os.truncate(path, os.path.getsize(path) // 2)


def nan(*shape):
    value = torch.zeros(shape)
    value.view(-1)[-1] = float("nan")
    return value


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 46838023\n"
# File name: the function that makes it, and parts of the error. Without parts the file is valid.
FILES = {
    "another head.pth": (saved(lambda: {"state_dict": state(dim=1000, mlp=True)}),),
    "torchvision.pth": (saved(lambda: plain(models.resnet18(num_classes=7))),),
    "half precision.pth": (
        saved(lambda: {k: v.half() for k, v in plain(models.resnet18()).items()}),
    ),
    "old torch.pth": (saved(teacher, _use_new_zipfile_serialization=False),),
    "not a ResNet.pth": (
        saved(lambda: models.squeezenet1_1().state_dict()),
        "holds no ResNet",
        "features.0.weight",
    ),
    "transformer.pth": (
        saved(lambda: nn.TransformerEncoderLayer(8, 2).state_dict()),
        "holds no ResNet",
        "self_attn",
    ),
    "a wrong arch.pth": (
        saved(lambda: teacher() | {"arch": "resnet50"}),
        "does not fit resnet50",
        "--teacher-arch",
    ),
    "another width.pth": (
        saved(lambda: teacher(layer1__0__conv1__weight=torch.zeros(32, 64, 3, 3))),
        "layer1.0.conv1.weight is (32, 64, 3, 3)",
    ),
    "a missing layer.pth": (
        saved(lambda: teacher(layer4__1__bn2__weight=None)),
        "layer4.1.bn2.weight is missing",
    ),
    "an extra layer.pth": (
        saved(lambda: teacher(layer5__0__weight=torch.ones(1))),
        "layer5.0.weight is unexpected",
    ),
    "another stem.pth": (
        saved(lambda: {"state_dict": state(stem="small")}),
        "its stem is small; expected imagenet",
        "--stem small",
    ),
    "not a number.pth": (
        saved(lambda: teacher(layer3__0__conv2__weight=nan(256, 256, 3, 3))),
        "layer3.0.conv2.weight",
        "not finite",
    ),
    "infinite.pth": (
        saved(lambda: teacher(bn1__running_var=torch.full((64,), torch.inf))),
        "bn1.running_var",
        "not finite",
    ),
    "integers.pth": (
        saved(lambda: teacher(bn1__weight=torch.ones(64, dtype=torch.int8))),
        "bn1.weight",
        "expected floats",
    ),
    "complex.pth": (
        saved(lambda: teacher(bn1__weight=torch.ones(64) * 1j)),
        "bn1.weight",
        "expected floats",
    ),
    "sparse.pth": (
        saved(lambda: teacher(bn1__weight=torch.ones(64).to_sparse())),
        "bn1.weight",
        "dense",
    ),
    "without values.pth": (
        saved(lambda: teacher(bn1__weight=torch.ones(64, device="meta"))),
        "bn1.weight",
        "dense",
    ),
    "strings.pth": (saved(lambda: teacher(bn1__weight="ones")), "bn1.weight", "expected a tensor"),
    "a list.pth": (saved(lambda: [torch.ones(1)]), "holds a list"),
    "no tensors.pth": (saved(lambda: {"epoch": 3}), "holds no network"),
    "arguments and tensors.pth": (
        saved(lambda: teacher() | {"args": Namespace(out=Path("runs"))}),
    ),
    "a pickled network.pth": (saved(models.resnet18), "holds code", "never loaded"),
    "code.pth": (saved(lambda: teacher() | {"run": Harm()}), "holds code", "never loaded"),
    "code of old torch.pth": (
        saved(lambda: {"a": Harm()}, _use_new_zipfile_serialization=False),
        "holds code",
        "never loaded",
    ),
    "only code.pkl": (written(pickle.dumps(Harm())), "holds code", "never loaded"),
    "code as text.pkl": (written(pickle.dumps(Harm(), protocol=0)), "not a checkpoint"),
    "cut.pth": (cut, "damaged, or cut short"),
    "damaged.pth": (flipped, "damaged", "use another"),
    "cut.safetensors": (cut_safetensors, "not a complete safetensors file"),
    "only a header.safetensors": (
        written(b"\x10\0\0\0\0\0\0\0{"),
        "not a complete safetensors file",
    ),
    "empty.pth": (written(b""), "is empty"),
    "a text.pth": (written(b"not found\n"), "not a checkpoint", "not found", "download"),
    "a web page.pth": (
        written(b"<!DOCTYPE html><html>\n" * 99),
        "not a checkpoint",
        "<!DOCTYPE html>",
        "download",
    ),
    "a pointer.pth": (written(LFS), "Git LFS", "git lfs pull"),
    "zeros.pth": (written(bytes(9999)), "not a checkpoint"),
    "an archive.pth": (written(b"PK\x03\x04" + bytes(999)), "damaged, or cut short"),
    "a folder.pth": (lambda path: path.mkdir(), "is a folder", "expected a checkpoint file"),
    "a pipe.pth": (os.mkfifo, "not a regular file", "expected a checkpoint"),
    "a loop.pth": (lambda path: path.symlink_to(path), "no such file"),
    "no one's.pth": (lambda path: path.touch(0), "Permission denied"),
    "moco_v2_200ep_pretrain.pth.tar": (saved(teacher), "has md5", "59fd9945", "download it again"),
}


def features(path, images, of_array=np.asarray, of_paths=list):
    """Write features of all images, changed by `of_array` and `of_paths`."""
    paths = sorted(str(each.relative_to(images)) for each in images.rglob("*.*"))
    rows = np.random.default_rng(0).standard_normal((len(paths), 6), dtype=np.float32)
    with path.open("wb") as file:
        np.save(file, of_array(rows))
    content = {"paths": of_paths(paths), "arch": "resnet50", "features": "pooled"}
    path.with_suffix(".json").write_text(json.dumps(content))


# File of features: changes of its array and paths, options, and parts of the error.
SIMREG = "--distill simreg"
FEATURES = {
    "features.npy": ({}, "--distill simreg similarity --similarity-k 4"),
    "in half precision.npy": ({"of_array": np.float16}, SIMREG),
    "for maps.npy": ({}, "", "--distill mgd", "has no maps", "Use one of: simreg, similarity"),
    "for a head.npy": ({}, "--distill disco", "--distill disco", "the teacher's head"),
    "with a network.npy": ({}, f"{SIMREG} --teacher-arch resnet50", "no effect", "leave it out"),
    "resized.npy": ({}, f"{SIMREG} --teacher-size 64", "no effect", "leave it out"),
    "without a row.npy": (
        {"of_array": lambda rows: rows[1:], "of_paths": lambda paths: paths[1:]},
        SIMREG,
        "no row for 1 of 8 images, such as ",
        "job.embed",
    ),
    "of another folder.npy": (
        {"of_paths": lambda paths: [f"other/{each}" for each in paths]},
        SIMREG,
        "no row for 8 of 8 images, such as ",
        "the file has other/",
    ),
    "fewer rows.npy": ({"of_array": lambda rows: rows[1:]}, SIMREG, "11 rows and 12 paths in "),
    "infinite.npy": ({"of_array": lambda rows: rows * np.inf}, SIMREG, "row 0, of ", "not finite"),
    "whole numbers.npy": ({"of_array": np.int64}, SIMREG, "an array (12, 6) of int64; expected"),
    "one dimension.npy": ({"of_array": np.ravel}, SIMREG, "an array (72,) of float32; expected"),
    "features.parquet": ({}, SIMREG, "expected a file ending in .npy", "job.embed"),
}


@pytest.fixture(scope="module")
def values(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name, (make, *_) in FILES.items():
        make(folder / name)
    for name, (changes, *_) in FEATURES.items():
        features(folder / name, good, **changes)
    return {"good": good, "folder": folder}


def case(name, program, argv):
    parts = FILES[name][1:]
    return Case(
        f"{program}: {name}",
        argv,
        parts and (name, *parts),
        program,
        unprivileged="no one's" in name,
    )


TEACHERS = [
    case(name, "job.train", ["{good}", *SMALL, "--teacher", f"{{folder}}/{name}"]) for name in FILES
]
# These programs accept any network and stem.
OTHER = ("a wrong arch.pth", "another stem.pth")
NAMES = [name for name in FILES if name not in OTHER]
PRETRAINED = [
    case(name, "job.linear", ["{good}", *LINEAR, "--pretrained", f"{{folder}}/{name}"])
    for name in NAMES
]
EXPORTED = [case(name, "job.export", [f"{{folder}}/{name}", "OUT.safetensors"]) for name in NAMES]
CHANNELS = [
    Case(
        "a teacher of fewer channels",
        ["{good}", *SMALL, "-a", "resnet50", "--teacher", "{folder}/torchvision.pth"],
        ("torchvision.pth", "resnet18", "-a resnet50", "stage 1", "64 channels"),
    ),
    Case(
        "a teacher of fewer channels in a stage",
        [
            "{good}",
            *SMALL,
            *"-a resnet50 --mgd-stages 3 --teacher {folder}/torchvision.pth".split(),
        ],
        ("torchvision.pth", "stage 3", "256 channels", "1024"),
    ),
    Case(
        "a teacher of another network",
        ["{good}", *SMALL, "--teacher", "{folder}/torchvision.pth", "--teacher-arch", "resnet34"],
        ("torchvision.pth", "does not fit resnet34", "--teacher-arch"),
    ),
    Case(
        "two teachers",
        ["{good}", *SMALL, "-a", "resnet34", "--resume", "{folder}/old torch.pth"]
        + ["--teacher", "{folder}/torchvision.pth"],
        ("old torch.pth", "--resume", "--teacher", "Leave out one"),
    ),
    Case(
        "resuming a file of another program",
        ["{good}", *SMALL, "--resume", "{folder}/torchvision.pth"],
        ("torchvision.pth", "has no format; expected a checkpoint of job.train"),
    ),
]


OF_FEATURES = [
    Case(
        f"features: {name}",
        ["{good}", *SMALL, *options.split(), "--teacher", f"{{folder}}/{name}"],
        parts and (name, *parts),
    )
    for name, (_, options, *parts) in FEATURES.items()
]
CASES = TEACHERS + PRETRAINED + EXPORTED + CHANNELS + OF_FEATURES
SHORT = [
    "job.train: torchvision.pth",
    "job.train: not a ResNet.pth",
    "job.train: a missing layer.pth",
    "job.train: infinite.pth",
    "job.train: code.pth",
    "job.train: cut.pth",
    "job.train: a pointer.pth",
    "job.linear: only code.pkl",
    "job.export: cut.safetensors",
    "a teacher of another network",
    "features: features.npy",
    "features: for maps.npy",
    "features: infinite.npy",
]


@pytest.mark.parametrize("case", short(CASES, *SHORT), ids=lambda case: case.name)
def test_file(case, outcomes, values):
    check(case, outcomes, values)


@pytest.mark.short
@pytest.mark.parametrize("case", TEACHERS[-1:], ids=lambda case: case.name)
def test_no_code_ran(case, outcomes):
    assert not any("harm" in os.listdir(folder) for _, folder in outcomes.values())
