"""Checkpoints with objects of other programs, and files that must be refused."""

import argparse
import builtins
import collections
import datetime
import decimal
import enum
import importlib
import logging
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from tests.unit.checkpoints.test_foreign import assert_same, body, refused, torchvision_state
from torch import nn
from torchvision import models

from job.errors import RunError
from job.checkpoints.layouts import find_networks
from job.checkpoints.folder import Checkpoints, check_size, load
from job.checkpoints.stand_ins import MOST_NAMES, stand_ins
from job.checkpoints.foreign_file import read_content
from job.checkpoints.foreign import read_backbone


class Stage(enum.Enum):
    FIT = "fit"


class Slots:
    __slots__ = ("value",)

    def __init__(self):
        self.value = np.zeros(2)


def exclude_bias_and_norm(parameter):
    """A function whose name Barlow Twins' and VICReg's optimizers save in a checkpoint."""


OBJECTS = {
    "arguments": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("runs")),
    "a path": pathlib.PurePosixPath("runs"),
    "numbers of numpy": {"loss": np.float64(0.5), "step": np.int64(3)},
    "arrays": [np.zeros((2, 3)), np.random.get_state(), np.random.default_rng(0)],
    "a default dictionary": collections.defaultdict(list, a=[1]),
    "a queue": collections.deque([1.0, 2.0], maxlen=5),
    "a counter": collections.Counter("aab"),
    "times": [
        datetime.datetime(2020, 1, 1),
        datetime.timedelta(1),
        datetime.datetime.now(datetime.UTC),
    ],
    "a name space": types.SimpleNamespace(lr=0.1),
    "an enumeration": {"stage": Stage.FIT, Stage.FIT: 1},
    "slots": Slots(),
    "a decimal": decimal.Decimal("0.1"),
    "a logger": logging.getLogger("trainer"),
    "ranges": [range(3), slice(1, 2), frozenset([1])],
    "a function": {"param_groups": [{"weight_decay_filter": exclude_bias_and_norm}]},
    "a method": collections.OrderedDict.fromkeys,
    "an optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1),
    "a schedule": torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1), 1
    ),
}


def written(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", OBJECTS)
def test_tensors_next_to_harmless_objects_are_read(tmp_path, key, legacy):
    tensors = {"weight": torch.arange(3.0), "bias": torch.ones(2)}
    content = {"before": OBJECTS[key], "state_dict": tensors, "after": [OBJECTS[key]], "epoch": 3}
    loaded = read_content(written(tmp_path / "weights", content, legacy))
    assert_same(loaded["state_dict"], tensors)
    assert loaded["epoch"] == 3


SOURCE = """
import pathlib
pathlib.Path(FLAG).touch()  # as this module is imported
class Buffer:
    def __init__(self): self.history = [1.0]
    def __setstate__(self, state): pathlib.Path(FLAG).touch()
class Node(dict):
    def __init__(self, **items): super().__init__(items); self.frozen = False
    def __setitem__(self, key, value): pathlib.Path(FLAG).touch(); super().__setitem__(key, value)
class Items(list): pass
"""
# mmengine's HistoryBuffer in `message_hub`, yacs' and VISSL's dictionaries, omegaconf's lists.
FOREIGN = "package.logging.buffers"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A file's content with objects of a package, and a flag that the package's code creates."""
    flag = tmp_path / "ran"
    module = types.ModuleType(FOREIGN)
    with monkeypatch.context() as patch:
        for name in ("package", "package.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, FOREIGN, module)
        exec(f"FLAG = {str(flag)!r}\n{SOURCE}", module.__dict__)
        config = module.Node(
            MODEL=module.Node(ARCH="resnet18"), items=module.Items([module.Buffer()])
        )
        content = {
            "message_hub": {"log_scalars": {"train/loss": module.Buffer()}},
            "config": config,
        }
        yield content | {"model": module.Node(**torchvision_state())}, flag


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_objects_of_missing_package_run_no_code(tmp_path, foreign, monkeypatch, legacy):
    content, flag = foreign
    path = written(tmp_path / "weights", content, legacy)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(f"open({str(flag)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("package", "package.logging", FOREIGN):
        monkeypatch.delitem(sys.modules, name)
    flag.unlink()
    backbone = read_backbone(path)
    assert_same(backbone.state, body(torchvision_state()))
    assert backbone.report.startswith(
        f"resnet18 from {path} (layout: named layers in model): 120 tensors loaded"
    )
    assert read_content(path)["config"]["MODEL"] == {"ARCH": "resnet18"}
    assert not flag.exists()
    assert "package" not in sys.modules


def test_tensor_of_foreign_function_is_named(tmp_path, foreign):
    content, _ = foreign
    content["model"]["layer3.0.conv1.weight"] = content["message_hub"]["log_scalars"]["train/loss"]
    message = refused(written(tmp_path / "weights", content))
    assert f"layer3.0.conv1.weight is {FOREIGN}.Buffer; expected a tensor" in message


def test_options_of_other_program_are_ignored(tmp_path):
    content = {
        "model": torchvision_state(),
        "format": 1,
        "config": {"image_size": np.int64(32), "list": [np.int64(1)]},
    }
    assert read_backbone(written(tmp_path / "weights", content)).meta["config"] == {}


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {  # by their names in files, of which some are Python 2's
    "posix.system": (os.system, "touch ran"),
    "commands.Popen": (subprocess.Popen, ["touch", "ran"]),
    "eval": (builtins.eval, "open('ran', 'w')"),
    "exec": (builtins.exec, "open('ran', 'w')"),
    "io.open": (builtins.open, "ran", "w"),
    "importlib.import_module": (importlib.import_module, "antigravity"),
    "runpy.run_module": (runpy.run_module, "antigravity"),
    "pickle.loads": (pickle.loads, b"."),
    "posix.mkdir": (os.mkdir, "ran"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CALLS)
def test_code_is_refused_by_name(tmp_path, monkeypatch, name, legacy):
    monkeypatch.chdir(tmp_path)
    content = {
        "state_dict": torchvision_state(),
        "args": argparse.Namespace(run=Call(*CALLS[name])),
    }
    message = refused(written(tmp_path / "weights", content, legacy))
    assert f"holds code or objects besides tensors ({name}), which are never loaded" in message
    assert message.endswith('torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW)')
    assert os.listdir(tmp_path) == ["weights"]


@pytest.mark.parametrize("name", ["torch.hub.load", "numpy.testing.runstring", "package.run"])
def test_call_of_package_s_function_is_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    module, _, function = name.rpartition(".")
    code = f"c{module}\n{function}\n(X\x10\x00\x00\x00open('ran', 'w')tR.".encode()
    content = pickle.dumps({"w": 1}, protocol=2)[:-2] + b"X\x03\x00\x00\x00run" + code[:-1] + b"u."
    content = content.replace(b"}q\x00X", b"}q\x00(X").replace(b"K\x01s", b"K\x01")
    with torch.serialization._open_zipfile_writer(str(tmp_path / "weights")) as archive:
        archive.write_record("data.pkl", content, len(content))
        archive.write_record("byteorder", b"little", 6)
    loaded = read_content(str(tmp_path / "weights"))
    assert loaded["w"] == 1
    assert type(loaded["run"]).__name__ == name
    assert os.listdir(tmp_path) == ["weights"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_network_is_refused(tmp_path, legacy):
    message = refused(written(tmp_path / "weights", models.resnet18(), legacy))
    name = "a module with its source code" if legacy else "torchvision.models.resnet.ResNet"
    assert f"holds code or objects besides tensors ({name}), which are never loaded" in message
    assert legacy or message.endswith(
        "torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)"
    )


def test_pickled_network_in_dictionary_is_refused(tmp_path):
    message = refused(written(tmp_path / "weights", {"epoch": 3, "model": models.resnet18()}))
    assert "holds no network" in message
    assert "'model': torchvision.models.resnet.ResNet" in message
    assert message.endswith(
        'torch.save(torch.load(FILE, weights_only=False)["model"].state_dict(), NEW)'
    )


def test_later_pickle_protocol_is_named(tmp_path):
    torch.save({"state_dict": torchvision_state()}, tmp_path / "weights", pickle_protocol=4)
    assert "(a pickle of protocol 3 or later)" in refused(str(tmp_path / "weights"))


def test_object_s_memory_is_limited(tmp_path):
    content = {
        "state_dict": {"w": torch.ones(2)},
        "args": argparse.Namespace(zeros=Call(bytearray, 2**44)),
    }
    assert "is not a complete checkpoint" in refused(written(tmp_path / "weights", content))


def test_own_checkpoint_with_object_is_refused(tmp_path):
    path = written(
        tmp_path / "checkpoint_0001_000000.pth.tar", {"format": 3, "args": argparse.Namespace()}
    )
    with pytest.raises(
        RunError, match=r"besides tensors \(argparse.Namespace\), which are never loaded"
    ):
        load(path)
    with pytest.raises(RunError, match="none of the 1 checkpoints"):
        Checkpoints(str(tmp_path), 1).newest(print)


def compressed(path, pickled):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return str(path)


def test_compressed_pickle_is_not_searched(tmp_path):
    """torch does not compress pickles. 40 MB of opcodes compress to 40 kB."""
    path = compressed(tmp_path / "file.pth", b"\x80\x02" + b"N0" * 20_000_000 + b"N.")
    assert os.path.getsize(path) < 10**5
    assert stand_ins(path) == []


def test_search_of_large_pickle_is_limited(tmp_path):
    names = b"".join(b"cmodule%d\nname\n0" % number for number in range(3000))
    (tmp_path / "file.pth").write_bytes(b"\x80\x02" + names + b"N.")
    assert len(stand_ins(str(tmp_path / "file.pth"))) == 2 * MOST_NAMES


def test_attributes_of_dictionary_are_ignored():
    """A file can set attributes of an OrderedDict."""
    content = collections.OrderedDict(torchvision_state())
    content.items = content.values = 1
    [(layout, _)] = find_networks("FILE", content)
    assert layout.prefix == ""
    with pytest.raises(MemoryError):
        check_size(content, 10**6)
