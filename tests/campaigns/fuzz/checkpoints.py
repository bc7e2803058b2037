"""Checkpoint files, damaged anywhere, or hostile: with sound checksums around pickles that ask for code, or for too much."""

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

# Pieces of pickles: calls of what would run, write or take memory, tensors with wrong shapes, and odd opcodes.
CALLS = [b"cos\nsystem\n", b"cbuiltins\nexec\n", b"cposix\nmkdir\n", b"csubprocess\nPopen\n", b"cbuiltins\nbytearray\n",
         b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n",
         b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n", b"ctorch\ndevice\n", b"ccollections\nOrderedDict\n",
         b"c__builtin__\nbytearray\n", b"ctorch\nFloatTensor\n", b"ctorch.storage\nUntypedStorage\n", b"cbuiltins\nset\n",
         b"ctorch\nload\n", b"ctorch.storage\n_load_from_bytes\n", b"ctorch\nFloatStorage\n", b"ctorch\nfloat64\n",
         b"cargparse\nNamespace\n", b"cpackage.module\nThing\n", b"cbuiltins\ngetattr\n",
         b"ccollections\ndefaultdict\n"]  # fmt: skip
ARGUMENTS = [
    b")",
    b"\x85",
    b"(K\x02K\x03t",
    b"(X\x04\x00\x00\x00pwnttu",
    b"(J\xff\xff\xff\x7ft",
    b"(X\x05\x00\x00\x00utf-8t",
]
ODD = [
    b"b",
    b"R",
    b"Q",
    b"\x81",
    b"s",
    b"u",
    b"(",
    b"t",
    b"0",
    b"N",
    b"}",
    b"]",
    b"\x8f",
    b"h\x00",
    b"q\x05",
    b"a",
    b"e",
    b".",
]
NAMES = [
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"data.pkl",
    b"data/0",
    b"version",
    b"byteorder",
    b"big",
    b"../../x",
]


def seeds() -> list[bytes]:
    """A run's checkpoint, another program's, a state dict of an encoder's first layer, and all in torch's older form."""
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
    return [written(content, new) for content in contents for new in (True, False)]


def written(content, new: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def mutate(draw: Random, data: bytes, other: bytes) -> bytes:
    """Change the file's bytes, or, where it is a zip file, what is in it, with checksums that fit again."""
    if draw.random() < 0.7:
        try:
            return repacked(draw, data, other)
        except Exception:  # no zip file, or none any more
            pass
    return change(draw, data, other, NAMES + CALLS)


def repacked(draw: Random, data: bytes, other: bytes) -> bytes:
    """Change one member of a zip file: its content, name or compression; or leave it out, or put it in twice."""
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = draw.choice([name for name in names if name.endswith("data.pkl")] * len(names) + names)
    with zipfile.ZipFile(file, "w") as target:
        for name in names:
            content, times, kind = source.read(name), 1, zipfile.ZIP_STORED
            if name == chosen:
                what = draw.random()
                if what < 0.8:
                    content = (
                        pickled(draw, content, other)
                        if name.endswith("data.pkl")
                        else change(draw, content, other, NAMES)
                    )
                elif what < 0.9:
                    times, kind = (
                        draw.choice([0, 1, 2]),
                        draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
                    )
                    content *= draw.choice([0, 1, 1, 100])
                else:
                    name = change(draw, name.encode(), other[:20], NAMES).decode("latin-1")
            for _ in range(times):
                target.writestr(name, content, kind)
    return file.getvalue()


def pickled(draw: Random, data: bytes, other: bytes) -> bytes:
    """Change a pickle: mostly between two of its opcodes."""
    try:
        places = [place for _, _, place in pickletools.genops(data)]
    except Exception:  # no whole pickle any more
        places = []
    if len(places) < 2 or draw.random() < 0.3:
        return change(draw, data, other, CALLS + ARGUMENTS + ODD)
    at = draw.randrange(len(places) - 1)
    start, end = places[at], places[at + draw.choice([0, 0, 1])]
    number = draw.choice([-1, 1]) * draw.choice(NUMBERS)
    piece = draw.choice(
        [
            draw.choice(CALLS) + draw.choice(ARGUMENTS) + b"R",
            draw.choice(CALLS),
            draw.choice(ARGUMENTS),
            draw.choice(ODD),
            b"\x8a\x09" + number.to_bytes(9, "little", signed=True),
            data[slice(*sorted(draw.sample(places, 2)))],
            b"]" * 5000,
        ]
    )
    return data[:start] + piece + data[end:]


def check(path: Path) -> str:
    """Of a file with a ResNet its head. RunError: anything else, and for a run's checkpoint objects too."""
    with contextlib.suppress(RunError):
        assert isinstance(load(str(path)), dict)
    return read_backbone(str(path)).head
