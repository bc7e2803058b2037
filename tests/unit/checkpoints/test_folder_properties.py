import os
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.checkpoints.folder import BEST, LAST, Checkpoints, load

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


@st.composite
def tensors(draw):
    """A tensor of any type, shape (scalars and empty ones too) and bytes, whole or a view of a larger one."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.Size(shape).numel() * dtype.itemsize
    content = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    value = torch.frombuffer(bytearray(content or bytes(dtype.itemsize)), dtype=dtype)[
        : torch.Size(shape).numel()
    ].view(shape)
    form = draw(st.sampled_from(["whole", "transposed", "part", "parameter"]))
    if form == "transposed" and value.dim() > 1:
        return value.transpose(0, -1)
    if form == "part" and value.dim():
        return value[1:]
    if form == "parameter":
        return torch.nn.Parameter(value, requires_grad=dtype.is_floating_point)
    return value


KEYS = st.text(max_size=8) | st.integers(-(2**63), 2**63)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=20)
    | tensors()
)
CONTENTS = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(KEYS, inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=8,
    ),
    max_size=5,
)


def same(one, other):
    """Equal to the bit, types and all; a NaN is itself, and 0 is not -0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if torch.is_tensor(one):
        alike = (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.requires_grad == other.requires_grad
        )
        bits = [
            value.detach().contiguous().view(-1).view(torch.uint8).tolist()
            for value in (one, other)
        ]
        return alike and bits[0] == bits[1]
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return one == other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function to the same folder, made anew: an example must not see another's files."""
    root = tmp_path_factory.mktemp("run") / "run"

    def anew():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return str(root)

    return anew


@given(content=CONTENTS)
def test_load_returns_the_saved_bits(folder, content):
    content = {**content, "epoch": 1, "step": 2}
    path = Checkpoints(folder(), keep=1).save(content)
    loaded = load(path)
    assert same({key: loaded[key] for key in content}, content)


@given(content=CONTENTS)
def test_load_keeps_shared_memory(folder, content):
    shared = torch.arange(6.0)
    path = Checkpoints(folder(), keep=1).save(
        {**content, "epoch": 0, "step": 0, "one": shared, "other": shared.view(2, 3)}
    )
    loaded = load(path)
    loaded["one"][5] = -1.0
    assert loaded["other"][1, 2] == -1.0


PLACES = st.tuples(
    st.integers(0, 12) | st.integers(9990, 12_000),
    st.integers(0, 12) | st.integers(999_990, 2_000_000),
)


@given(
    places=st.lists(PLACES, min_size=1, max_size=6),
    keep=st.integers(1, 4),
    bests=st.sets(st.integers(0, 5)),
)
def test_save_keeps_the_newest_of_the_course(folder, places, keep, bests):
    """A run may go back: what comes after the one just saved is of a course that it has left."""
    checkpoints, there = Checkpoints(folder(), keep), set()
    best = None
    for number, (epoch, step) in enumerate(places):
        path = checkpoints.save(
            {"epoch": epoch, "step": step, "number": number}, best=number in bests
        )
        best = number if number in bests else best
        there = set(
            sorted(place for place in there | {(epoch, step)} if place <= (epoch, step))[-keep:]
        )
        contents = [load(path) for path in checkpoints.paths()]
        assert [(content["epoch"], content["step"]) for content in contents] == sorted(there)
        assert os.path.realpath(os.path.join(checkpoints.folder, LAST)) == os.path.realpath(path)
        assert checkpoints.newest(lambda line: None)["number"] == number
    files = len(there) + 1 + (best is not None)
    assert len(os.listdir(checkpoints.folder)) == files
    if best is not None:
        assert load(os.path.join(checkpoints.folder, BEST))["number"] == best
