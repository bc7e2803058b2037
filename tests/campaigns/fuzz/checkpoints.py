"""Fuzz target: damaged checkpoints, and hostile ones whose pickles run code or need memory."""

import contextlib
import io
import pickletools
import zipfile
from argparse import Namespace
from collections import defaultdict, deque
from pathlib import Path
from random import Random

import numpy as np
import torch
from mutations import NUMBERS, change

from job.errors import RunError
from job.checkpoints.folder import load
from job.checkpoints.foreign import read_backbone

# Pieces of pickles: functions that run code, write or allocate, wrong tensors, unusual opcodes.
FUNCTIONS = """
    os.system builtins.exec posix.mkdir subprocess.Popen builtins.bytearray _codecs.encode
    torch._utils._rebuild_tensor_v2 torch._utils._rebuild_sparse_tensor
    torch._utils._rebuild_parameter torch.Size torch.device collections.OrderedDict
    __builtin__.bytearray torch.FloatTensor torch.storage.UntypedStorage builtins.set torch.load
    torch.storage._load_from_bytes torch.FloatStorage torch.float64 argparse.Namespace
    package.module.Thing builtins.getattr collections.defaultdict
""".split()
CALLS = [
    f"c{module}\n{name}\n".encode()
    for module, _, name in (function.rpartition(".") for function in FUNCTIONS)
]
ARGUMENTS = [b")", b"\x85", b"(K\x02K\x03t", b"(X\x04\x00\x00\x00pwnttu", b"(J\xff\xff\xff\x7ft"]
ARGUMENTS += [b"(X\x05\x00\x00\x00utf-8t"]
OPCODES = [
    *(bytes([code]) for code in b"bRQ\x81su(t0N}]\x8f"),
    b"h\x00",
    b"q\x05",
    b"a",
    b"e",
    b".",
]
NAMES = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"]
NAMES += b"data.pkl data/0 version byteorder big ../../x".split()


def seeds() -> list[bytes]:
    """Return a run's checkpoint, another program's and a state dict, in torch's two formats."""
    weight = torch.arange(9 * 64 * 3, dtype=torch.float32).view(64, 3, 3, 3)
    run = {
        "epoch": 3,
        "step": 2,
        "format": 3,
        "arch": "resnet18",
        "state_dict": {
            "module.encoder_q.conv1.weight": weight,
            "module.queue_ptr": torch.zeros(1, dtype=torch.long),
        },
        "optimizer": {
            "state": {0: {"momentum_buffer": weight.half()}},
            "param_groups": [{"lr": 0.03, "params": [0]}],
        },
        "config": {"schedule": [1, 2], "cos": True, "out": ""},
        "statistics": None,
    }
    other = {
        "args": Namespace(out=Path("runs"), lr=0.1),
        "model": defaultdict(
            list, {"_orig_mod.layer1.0.conv1.weight": weight, "_orig_mod.conv1.weight": weight}
        ),
        "log": {"loss": [np.float64(0.5), deque([1.0])]},
    }
    contents = [
        run,
        other,
        {"conv1.weight": weight.bfloat16(), "bn1.bias": torch.nn.Parameter(torch.zeros(64))},
        {},
        [1],
    ]
    return [saved(content, new) for content in contents for new in (True, False)]


def saved(content, new: bool) -> bytes:
    """Return the bytes of a file. new: in torch's zip format, not in its older one."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def mutate(draw: Random, data: bytes, other: bytes) -> bytes:
    """Change a file's bytes, or a member of a zip file, with valid checksums."""
    if draw.random() < 0.7:
        try:
            return change_member(draw, data, other)
        except Exception:  # not a valid zip file
            pass
    return change(draw, data, other, NAMES + CALLS)


def change_member(draw: Random, data: bytes, other: bytes) -> bytes:
    """Change one member of a zip file: content, name, compression, or number of copies."""
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = draw.choice([name for name in names if name.endswith("data.pkl")] * len(names) + names)
    with zipfile.ZipFile(file, "w") as target:
        for name in names:
            content, copies, compression = source.read(name), 1, zipfile.ZIP_STORED
            if name == chosen:
                case = draw.random()
                if case < 0.8 and name.endswith("data.pkl"):
                    content = change_pickle(draw, content, other)
                elif case < 0.8:
                    content = change(draw, content, other, NAMES)
                elif case < 0.9:
                    copies = draw.choice([0, 1, 2])
                    compression = draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
                    content *= draw.choice([0, 1, 1, 100])
                else:
                    name = change(draw, name.encode(), other[:20], NAMES).decode("latin-1")
            for _ in range(copies):
                target.writestr(name, content, compression)
    return file.getvalue()


def change_pickle(draw: Random, data: bytes, other: bytes) -> bytes:
    """Change a pickle, mostly between two opcodes."""
    try:
        offsets = [offset for _, _, offset in pickletools.genops(data)]
    except Exception:  # an incomplete pickle
        offsets = []
    if len(offsets) < 2 or draw.random() < 0.3:
        return change(draw, data, other, CALLS + ARGUMENTS + OPCODES)
    index = draw.randrange(len(offsets) - 1)
    start, end = offsets[index], offsets[index + draw.choice([0, 0, 1])]
    number = draw.choice([-1, 1]) * draw.choice(NUMBERS)
    piece = draw.choice(
        [
            draw.choice(CALLS) + draw.choice(ARGUMENTS) + b"R",
            draw.choice(CALLS),
            draw.choice(ARGUMENTS),
            draw.choice(OPCODES),
            b"\x8a\x09" + number.to_bytes(9, "little", signed=True),
            data[slice(*sorted(draw.sample(offsets, 2)))],
            b"]" * 5000,
        ]
    )
    return data[:start] + piece + data[end:]


def check(path: Path) -> str:
    """Read a file as a checkpoint and as a backbone. Return the backbone's head.

    RunError: the file has no valid ResNet.
    """
    with contextlib.suppress(RunError):
        assert isinstance(load(str(path)), dict)
    return read_backbone(str(path)).head
