"""Save, keep, resume from and load checkpoint files, also after damage and crashes."""

import contextlib
import errno
import hashlib
import itertools
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import refused
from inject import injected
from job import __version__
from job.errors import RunError
from job.checkpoints import folder
from job.checkpoints.folder import BEST, FORMAT, LAST, LEFT, Checkpoints, load


def content(epoch=1, step=0, value=1.0):
    """Return a checkpoint's content: tensors of several dtypes, numbers, text, containers."""
    return {
        "epoch": epoch,
        "step": step,
        "arch": "resnet18",
        "state_dict": {
            "module.w": torch.full((5, 3), value),
            "module.n": torch.tensor([7]),
            "module.h": torch.ones(2).half(),
        },
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.arange(4.0)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "mgd": {},
        "config": {"lr": 0.03, "mlp": True, "schedule": [1, 2], "teacher": "café"},
        "statistics": None,
    }


def same(one, other):
    """Return whether two values have the same types and bits, so that 0 differs from -0."""
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


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(str(tmp_path), keep=3)


def names(checkpoints):
    return [os.path.basename(path) for path in checkpoints.paths()]


def damage(path, change):
    """Replace a file's bytes by `change(bytes)`."""
    with open(path, "rb") as file:
        before = file.read()
    with open(path, "wb") as file:
        file.write(change(before))


def cut(path, fraction=0.5):
    damage(path, lambda before: before[: int(len(before) * fraction)])


def test_save_and_load_network_and_optimizer(checkpoints):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = checkpoints.save(
        {"epoch": 0, "step": 1, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}
    )
    other = torch.nn.Linear(3, 2)
    again = torch.optim.SGD(other.parameters(), 0.5, momentum=0.1)
    saved = load(path)
    other.load_state_dict(saved["state_dict"])
    again.load_state_dict(saved["optimizer"])
    assert same(dict(other.state_dict()), dict(net.state_dict()))
    assert same(again.state_dict(), optimizer.state_dict())


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


@st.composite
def tensors(draw):
    """Draw a tensor of any dtype, shape and bytes, or a view of a larger one."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.Size(shape).numel() * dtype.itemsize
    content = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    value = torch.frombuffer(bytearray(content or bytes(dtype.itemsize)), dtype=dtype)[
        : torch.Size(shape).numel()
    ].view(shape)
    form = draw(st.sampled_from(["contiguous", "transposed", "slice", "parameter"]))
    if form == "transposed" and value.dim() > 1:
        return value.transpose(0, -1)
    if form == "slice" and value.dim():
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


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory):
    """A function that empties a folder for an example, and returns it."""
    root = tmp_path_factory.mktemp("run") / "run"

    def empty():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return str(root)

    return empty


@given(saved=CONTENTS)
def test_load_returns_the_saved_bits(empty_folder, saved):
    saved = {**saved, "epoch": 1, "step": 2}
    loaded = load(Checkpoints(empty_folder(), keep=1).save(saved))
    assert same({key: loaded[key] for key in saved}, saved)
    assert (loaded["format"], loaded["version"]) == (FORMAT, __version__)


@given(saved=CONTENTS)
def test_load_keeps_shared_memory(empty_folder, saved):
    shared = torch.arange(6.0)
    path = Checkpoints(empty_folder(), keep=1).save(
        {**saved, "epoch": 0, "step": 0, "one": shared, "other": shared.view(2, 3)}
    )
    loaded = load(path)
    loaded["one"][5] = -1.0
    assert loaded["other"][1, 2] == -1.0


POSITIONS = st.tuples(
    st.integers(0, 12) | st.integers(9990, 12_000),
    st.integers(0, 12) | st.integers(999_990, 2_000_000),
)


@given(
    positions=st.lists(POSITIONS, min_size=1, max_size=6),
    keep=st.integers(1, 4),
    bests=st.sets(st.integers(0, 5)),
)
def test_save_keeps_the_newest_of_the_course(empty_folder, positions, keep, bests):
    """A run can go back. Then a save removes later checkpoints."""
    checkpoints, kept = Checkpoints(empty_folder(), keep), set()
    best = None
    for number, (epoch, step) in enumerate(positions):
        path = checkpoints.save(
            {"epoch": epoch, "step": step, "number": number}, best=number in bests
        )
        best = number if number in bests else best
        kept = set(sorted(each for each in kept | {(epoch, step)} if each <= (epoch, step))[-keep:])
        contents = [load(path) for path in checkpoints.paths()]
        assert [(each["epoch"], each["step"]) for each in contents] == sorted(kept)
        assert os.path.realpath(os.path.join(checkpoints.folder, LAST)) == os.path.realpath(path)
        assert checkpoints.newest(lambda line: None)["number"] == number
    assert len(os.listdir(checkpoints.folder)) == len(kept) + 1 + (best is not None)
    if best is not None:
        assert load(os.path.join(checkpoints.folder, BEST))["number"] == best


def test_save_names_epoch_and_step(checkpoints, tmp_path):
    path = checkpoints.save(content(epoch=12, step=345))
    assert path == str(tmp_path / "checkpoint_0012_000345.pth.tar")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_0012_000345.pth.tar", "last.pth.tar"]


def test_paths_are_checkpoints_oldest_first(checkpoints, tmp_path):
    made = [
        "checkpoint_0010_000000",
        "checkpoint_0002_000010",
        "checkpoint_0002_000009",
        "checkpoint_10000_1000000",
    ]
    others = [
        "checkpoint_1_2.pth.tar",
        "checkpoint_0001_000000.pth.tar.new",
        "last.pth.tar",
        "log.txt",
        "xcheckpoint_0001_000000",
    ]
    for name in [f"{name}.pth.tar" for name in made] + others:
        (tmp_path / name).write_bytes(b"")
    assert names(checkpoints) == [f"{made[n]}.pth.tar" for n in (2, 1, 0, 3)]


def test_paths_of_missing_folder_are_empty(tmp_path):
    assert Checkpoints(str(tmp_path / "none"), 3).paths() == []


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_save_keeps_the_newest_and_links_last(tmp_path, keep):
    checkpoints, saved = Checkpoints(str(tmp_path), keep), []
    for epoch, step in [(0, 5), (0, 10), (1, 0), (1, 5), (2, 0)]:
        saved.append(os.path.basename(checkpoints.save(content(epoch, step, value=len(saved)))))
        assert names(checkpoints) == saved[-keep:]
        assert os.readlink(tmp_path / LAST) == saved[-1]
        assert same(
            load(str(tmp_path / LAST)),
            content(epoch, step, value=len(saved) - 1) | {"format": FORMAT, "version": __version__},
        )
    assert sorted(os.listdir(tmp_path)) == [*saved[-keep:], LAST]


def test_last_survives_a_moved_folder(checkpoints, tmp_path):
    checkpoints.save(content())
    os.rename(tmp_path, f"{tmp_path}-moved")
    assert load(os.path.join(f"{tmp_path}-moved", LAST))["epoch"] == 1
    os.rename(f"{tmp_path}-moved", tmp_path)


def test_save_of_same_step_replaces_the_file(checkpoints):
    checkpoints.save(content(value=1.0))
    path = checkpoints.save(content(value=2.0))
    assert names(checkpoints) == ["checkpoint_0001_000000.pth.tar"]
    assert load(path)["state_dict"]["module.w"][0, 0] == 2


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_keeps_the_file_just_saved(tmp_path, keep):
    """A run that resumes from an older checkpoint saves steps before those in the folder."""
    checkpoints = Checkpoints(str(tmp_path), 5)
    for epoch in (1, 2, 3, 4, 5):
        checkpoints.save(content(epoch))
    path = Checkpoints(str(tmp_path), keep).save(content(1, 7))
    assert os.path.exists(path)
    assert same(
        load(str(tmp_path / LAST)), content(1, 7) | {"format": FORMAT, "version": __version__}
    )


def test_save_keeps_undamaged_before_damaged(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), 2)
    for epoch in (1, 2):
        checkpoints.save(content(epoch))
    cut(checkpoints.paths()[-1])
    one = Checkpoints(str(tmp_path), 1)
    assert one.newest(lambda text: None)["epoch"] == 1
    one.save(content(1, 7))
    assert one.newest(lambda text: None)["step"] == 7


class PowerCut(BaseException):
    """The end of the process during its work."""


def crash_while_writing(monkeypatch, fraction=0.5):
    """Let torch.save write a fraction of the bytes, and end there."""
    save = torch.save

    def half(obj, file, *args, **named):
        position = file.tell()
        save(obj, file, *args, **named)
        written = file.tell() - position
        file.seek(position)
        file.truncate(position + int(written * fraction))
        file.flush()
        raise PowerCut

    monkeypatch.setattr(torch, "save", half)


@pytest.mark.parametrize("fraction", [0, 0.5, 0.99, 1])
def test_crash_in_write_keeps_old_checkpoints(tmp_path, monkeypatch, fraction):
    checkpoints = Checkpoints(str(tmp_path), 1)
    checkpoints.save(content(1))
    with monkeypatch.context() as patch:
        crash_while_writing(patch, fraction)
        with pytest.raises(PowerCut):
            checkpoints.save(content(2))
    assert names(checkpoints) == ["checkpoint_0001_000000.pth.tar"]
    assert same(load(str(tmp_path / LAST)), content(1) | {"format": FORMAT, "version": __version__})
    assert checkpoints.newest(lambda text: None)["epoch"] == 1
    checkpoints.save(content(2))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_0002_000000.pth.tar", LAST]


def test_crash_in_write_of_same_step_keeps_old_file(checkpoints, monkeypatch):
    path = checkpoints.save(content(value=1.0))
    crash_while_writing(monkeypatch)
    with pytest.raises(PowerCut):
        checkpoints.save(content(value=2.0))
    assert load(path)["state_dict"]["module.w"][0, 0] == 1


def crashes(monkeypatch, steps, call, *args):
    """Call, and end after so many file operations. Return whether more were left.

    They are renames, links, syncs, removals and opened files.
    """
    left = [steps]

    def ending(call):
        def counted(*args, **named):
            if left[0] == 0:
                raise PowerCut
            left[0] -= 1
            return call(*args, **named)

        return counted

    with monkeypatch.context() as patch:
        for name in ("replace", "symlink", "link", "fsync", "remove", "open"):
            patch.setattr(os, name, ending(getattr(os, name)))
        try:
            call(*args)
        except PowerCut:
            return True
    return False


@pytest.mark.parametrize("steps", range(8))
def test_crash_in_save_leaves_a_complete_checkpoint(tmp_path, monkeypatch, steps):
    """The process ends before one operation of the save. `last` is a complete checkpoint."""
    checkpoints = Checkpoints(str(tmp_path), 1)
    checkpoints.save(content(1))
    crashes(monkeypatch, steps, checkpoints.save, content(2))
    assert load(str(tmp_path / LAST))["epoch"] in (1, 2)
    assert checkpoints.newest(lambda text: None)["epoch"] in (1, 2)
    checkpoints.save(content(3))
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint_0003_000000.pth.tar",
        LAST,
    ]  # no half-written file


def course(folder, epochs=4):
    """Save checkpoints of a run's first epochs, without removals."""
    checkpoints = Checkpoints(str(folder), keep=9)
    return checkpoints, [checkpoints.save(content(epoch)) for epoch in range(1, epochs + 1)]


def resumed(checkpoints) -> int:
    """Return the epoch from which --resume auto resumes."""
    return checkpoints.newest(lambda text: None)["epoch"]


@pytest.mark.parametrize("source", ["auto", "checkpoint_0002_000000.pth.tar"])
def test_resume_at_holds_until_first_save(tmp_path, source):
    """--resume auto goes back if the newest checkpoints are damaged."""
    checkpoints, paths = course(tmp_path)
    later = checkpoints.resume_at((2, 0), source if source == "auto" else str(tmp_path / source))
    assert later == paths[2:]
    assert resumed(checkpoints) == load(str(tmp_path / LAST))["epoch"] == 2
    assert all(os.path.exists(path + LEFT) for path in later)
    checkpoints.save(content(3, 7))
    assert names(checkpoints) == [
        f"checkpoint_000{n}.pth.tar" for n in ("1_000000", "2_000000", "3_000007")
    ]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(LEFT)]


@pytest.mark.parametrize("steps", range(8))
def test_crash_in_resume_at_leaves_one_course(tmp_path, monkeypatch, steps):
    """The old course loses its checkpoints from the newest on."""
    checkpoints, paths = course(tmp_path)
    ended = crashes(monkeypatch, steps, checkpoints.resume_at, (2, 0), paths[1])
    assert resumed(checkpoints) in ((2, 3, 4) if ended else (2,))
    assert load(str(tmp_path / LAST))["epoch"] in (2, 4)
    checkpoints.resume_at((2, 0), paths[1])
    assert resumed(checkpoints) == load(str(tmp_path / LAST))["epoch"] == 2


@pytest.mark.parametrize("last", ["old", "missing"])
def test_resume_at_repairs_last(tmp_path, last):
    """It can be missing or old after a kill between a checkpoint's rename and its link."""
    checkpoints, paths = course(tmp_path)
    os.remove(tmp_path / LAST)
    if last == "old":
        os.symlink(os.path.basename(paths[2]), tmp_path / LAST)
    checkpoints.resume_at((4, 0), "auto")
    assert os.readlink(tmp_path / LAST) == os.path.basename(paths[3])


def test_resume_at_without_links_copies_only_changes(linkless):
    checkpoints, paths = course(linkless)
    os.utime(linkless / LAST, (10**9, 10**9))
    checkpoints.resume_at((4, 0), "auto")
    assert os.stat(linkless / LAST).st_mtime == 10**9
    checkpoints.resume_at((2, 0), "auto")
    assert load(str(linkless / LAST))["epoch"] == 2


def test_resume_at_keeps_the_named_checkpoint(tmp_path):
    checkpoints, paths = course(tmp_path)
    again = Checkpoints(str(tmp_path), keep=1)
    again.resume_at((2, 0), str(tmp_path / os.path.relpath(paths[1], tmp_path)))
    for epoch in (3, 4, 5):
        again.save(content(epoch))
    assert names(again) == ["checkpoint_0002_000000.pth.tar", "checkpoint_0005_000000.pth.tar"]


@pytest.mark.parametrize("name", ["checkpoint_0002_000000.pth.tar", "mine.pth.tar", LAST], ids=str)
def test_resume_at_keeps_files_of_another_folder(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    source = Checkpoints(str(tmp_path / "there"), 2).save(content(2))
    given = tmp_path / "there" / name
    if not given.exists():
        os.rename(source, given)
    here = Checkpoints(str(tmp_path / "here"), keep=1)
    here.resume_at((2, 0), str(given))
    assert resumed(here) == load(str(tmp_path / "here" / LAST))["epoch"] == 2
    here.save(content(3))
    assert names(here) == ["checkpoint_0003_000000.pth.tar"] and load(str(given))["epoch"] == 2


def test_resumed_before_is_true_for_requeued_job(tmp_path, monkeypatch):
    """It is false for another job, and for a second command of the same job."""
    checkpoints, paths = course(tmp_path)
    given = str(tmp_path / LAST)  # a link that later saves change

    def resumed_before(path, job, restarts):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        return checkpoints.resumed_before(path)

    assert not resumed_before(given, "7", "1")
    assert not resumed_before(given, "7", "0")
    checkpoints.resume_at((4, 0), given)
    checkpoints.save(content(5))
    assert resumed_before(given, "7", "1") and resumed_before(given, "7", "2")
    assert not resumed_before(given, "7", "0")
    assert not resumed_before(paths[0], "7", "1")
    assert not resumed_before(given, "8", "1")
    (tmp_path / "resumed.yaml").write_bytes(b"\xff: [")
    assert not resumed_before(given, "7", "1")


def test_resume_at_renames_other_file_of_same_step(tmp_path):
    checkpoints, paths = course(tmp_path)
    os.rename(checkpoints.save(content(2, value=7.0)), tmp_path / "mine.pth.tar")
    Checkpoints(str(tmp_path), 9).save(content(2))
    checkpoints.resume_at((2, 0), str(tmp_path / "mine.pth.tar"))
    assert os.path.exists(paths[1] + LEFT)
    assert (
        load(paths[1])["state_dict"]["module.w"][0, 0]
        == load(str(tmp_path / LAST))["state_dict"]["module.w"][0, 0]
        == 7
    )


def test_save_keeps_other_files_named_left(tmp_path):
    checkpoints, _ = course(tmp_path)
    (tmp_path / "notes.left").mkdir()
    (tmp_path / "mine.pth.tar.left").touch()
    checkpoints.resume_at((2, 0), "auto")
    checkpoints.save(content(3))
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(LEFT)) == [
        "mine.pth.tar.left",
        "notes.left",
    ]


def test_save_syncs_before_renaming(checkpoints, monkeypatch):
    """Otherwise a power cut could leave a name without its bytes."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {b}"), replace(a, b)))
    path = checkpoints.save(content())
    assert (
        events.index(f"{path}.new") < events.index(f"-> {path}") < events.index(checkpoints.folder)
    )
    assert events.index(f"-> {os.path.join(checkpoints.folder, LAST)}") < events.index(
        checkpoints.folder
    )


NEWEST = """
import sys
from job.checkpoints import folder
from job import files
from job.checkpoints.folder import Checkpoints

files.PAUSES = (0,)
for read in (Checkpoints(sys.argv[1], 3).newest, lambda log: folder.load(sys.argv[2])):
    try:
        print(read(lambda line: None)["epoch"])
    except files.RunError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "expected"),
    [(1, ["2", "2"]), (99, ["ReadError cannot read", "RunError cannot read"])],
)
def test_newest_raises_if_file_system_fails(checkpoints, times, expected):
    """An older checkpoint would lose later steps."""
    checkpoints.save(content(1))
    path = checkpoints.save(content(2))
    environment = os.environ | injected(f"* open {path} 1 {times} {errno.EIO}")
    command = [sys.executable, "-c", NEWEST, checkpoints.folder, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start), done.stdout + done.stderr


def test_newest_is_none_without_checkpoints(checkpoints, tmp_path):
    lines = []
    assert checkpoints.newest(lines.append) is None
    (tmp_path / "checkpoint_0001_000000.pth.tar.new").write_bytes(b"half")
    assert checkpoints.newest(lines.append) is None
    assert lines == []


def test_newest_logs_its_path(checkpoints):
    for epoch in (1, 2, 10):
        path = checkpoints.save(content(epoch))
    lines = []
    assert checkpoints.newest(lines.append)["epoch"] == 10
    [line] = lines
    assert path in line


@pytest.mark.parametrize("broken", [1, 2])
def test_newest_skips_and_logs_damaged_files(checkpoints, broken):
    paths = [checkpoints.save(content(epoch)) for epoch in (1, 2, 3)]
    for path in paths[-broken:]:
        cut(path)
    lines = []
    assert checkpoints.newest(lines.append)["epoch"] == 3 - broken
    assert len(lines) == broken + 1
    assert all(path in line for path, line in zip(paths[::-1], lines, strict=False))
    assert ["skipped: " in line for line in lines] == [True] * broken + [False]
    assert all("\n" not in line for line in lines)


def test_newest_refuses_if_all_are_damaged(checkpoints):
    for epoch in (1, 2):
        cut(checkpoints.save(content(epoch)), 0.3)
    lines = []
    message = refused(checkpoints.newest, lines.append)
    assert checkpoints.folder in message
    assert "2 checkpoints" in message
    assert len(lines) == 2


# The seal.


def test_seal_leaves_a_plain_torch_file(checkpoints):
    path = checkpoints.save(content())
    for mmap in (False, True):
        assert same(
            torch.load(path, weights_only=True, mmap=mmap),
            content() | {"format": FORMAT, "version": __version__},
        )
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    data = open(path, "rb").read()
    assert data[-64:].decode() == hashlib.sha256(data[:-71]).hexdigest()


def test_load_accepts_a_file_without_seal(checkpoints):
    path = checkpoints.save(content())
    torch.save(torch.load(path, weights_only=True), path)
    assert same(load(path), content() | {"format": FORMAT, "version": __version__})


def test_seal_shows_a_flipped_bit_in_any_byte(checkpoints):
    """One bit of each byte, and all bits of the checksum and the archive's last record."""
    path, generator = checkpoints.save(content()), random.Random(0)
    data = open(path, "rb").read()
    flips = [(offset, generator.randrange(8)) for offset in range(len(data))]
    flips += [(offset, bit) for offset in range(len(data) - 93, len(data)) for bit in range(8)]
    for offset, bit in flips:
        flip(path, offset, bit)
        assert path in refused(load, path), (offset, bit)
        flip(path, offset, bit)
    assert open(path, "rb").read() == data


def flip(path, offset, bit):
    """Flip a bit in a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1 << bit]))


def test_seal_shows_a_cut_at_any_byte(checkpoints):
    path = checkpoints.save(content())
    for length in reversed(range(os.path.getsize(path))):
        os.truncate(path, length)
        assert path in refused(load, path), length


@pytest.mark.parametrize("seed", range(2))
def test_newest_falls_back_after_any_damage(checkpoints, seed):
    """The newest is cut at 64 offsets, with its first and last byte, and has 200 flipped bits."""
    before, path = checkpoints.save(content(1)), checkpoints.save(content(2))
    generator, size = random.Random(seed), os.path.getsize(path)
    shutil.copyfile(path, path + ".copy")
    damages = [
        lambda at=at: os.truncate(path, at)
        for at in [0, size - 1, *generator.sample(range(size), 62)]
    ]
    damages += [
        lambda: flip(path, generator.randrange(size), generator.randrange(8)) for _ in range(200)
    ]
    for number, damaged in enumerate(damages):
        damaged()
        lines = []
        assert checkpoints.newest(lines.append)["epoch"] == 1, number
        assert [line.split(path)[0] for line in lines] == [
            "skipped: ",
            f"resuming from {before}",
        ]
        shutil.copyfile(path + ".copy", path)
    assert checkpoints.newest(lines.append)["epoch"] == 2


# Full disks. tests/campaigns/faults has full, read-only, slow and vanished ones.


@contextlib.contextmanager
def room_for(size):
    """Let no file grow above `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("more", [0, 100_000], ids=["small", "larger than a write"])
def test_save_on_full_disk_keeps_old_files(checkpoints, tmp_path, more):
    old = checkpoints.save(content(1) | {"more": torch.zeros(more)}, best=True)
    listing, data = sorted(os.listdir(tmp_path)), open(old, "rb").read()
    for size in [*range(0, len(data), len(data) // 100), *range(len(data) - 93, len(data))]:
        with room_for(size):
            message = refused(checkpoints.save, content(2) | {"more": torch.zeros(more)}, True)
        problem = "File too large; the checkpoints before it are untouched"
        assert f"checkpoint_0002_000000.pth.tar: {problem}" in message, size
        assert sorted(os.listdir(tmp_path)) == listing, size
    assert open(old, "rb").read() == data == open(tmp_path / BEST, "rb").read()
    assert load(str(tmp_path / LAST))["epoch"] == 1
    assert load(checkpoints.save(content(2)))["epoch"] == 2


def test_save_without_links_copies_last_and_best(linkless):
    checkpoints = Checkpoints(str(linkless), 2)
    for epoch in range(1, 5):
        newest = checkpoints.save(content(epoch), best=epoch == 2)
        assert not (linkless / LAST).is_symlink()
        assert (linkless / LAST).read_bytes() == open(newest, "rb").read()
    assert sorted(os.listdir(linkless)) == [BEST, *names(checkpoints), LAST]
    assert names(checkpoints) == [
        "checkpoint_0003_000000.pth.tar",
        "checkpoint_0004_000000.pth.tar",
    ]
    assert load(str(linkless / BEST))["epoch"] == 2
    assert checkpoints.newest(lambda text: None)["epoch"] == 4


def test_crash_without_links_keeps_last_and_best(linkless, monkeypatch):
    for steps in itertools.count():
        checkpoints = Checkpoints(str(linkless / str(steps)), 1)
        os.mkdir(checkpoints.folder)
        checkpoints.save(content(1), best=True)
        crashed = crashes(monkeypatch, steps, checkpoints.save, content(2), True)
        for path in (
            f"{checkpoints.folder}/{LAST}",
            f"{checkpoints.folder}/{BEST}",
            *checkpoints.paths(),
        ):
            assert load(path)["epoch"] in (1, 2)
        checkpoints.save(content(3), best=True)
        assert sorted(os.listdir(checkpoints.folder)) == [
            BEST,
            "checkpoint_0003_000000.pth.tar",
            LAST,
        ]
        if not crashed:
            break
    assert steps > 10


def test_save_without_links_or_room_keeps_old_files(linkless):
    """The disk has room for the checkpoint and half of its copy."""
    checkpoints, large = Checkpoints(str(linkless), 1), {"more": torch.zeros(1_000_000)}
    checkpoints.save(content(1) | large)
    with open(linkless / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    os.truncate(linkless / "filler", os.path.getsize(linkless / "filler") - 6_000_000)
    listing = sorted(os.listdir(linkless))
    problem = "No space left on device; the checkpoints before it are untouched"
    message = refused(checkpoints.save, content(2) | large)
    assert f"checkpoint_0002_000000.pth.tar: {problem}" in message
    assert sorted(os.listdir(linkless)) == listing
    assert load(str(linkless / LAST))["epoch"] == 1
    os.remove(linkless / "filler")
    checkpoints.save(content(2) | large)
    assert load(str(linkless / LAST))["epoch"] == 2


def test_save_in_a_copied_folder_links_last_again(checkpoints, tmp_path):
    """`cp -L` makes a file of the link last.pth.tar."""
    checkpoints.save(content(1))
    shutil.copytree(tmp_path, tmp_path / "copy")
    copy = Checkpoints(str(tmp_path / "copy"), 1)
    assert not (tmp_path / "copy" / LAST).is_symlink()
    copy.save(content(2))
    assert os.readlink(tmp_path / "copy" / LAST) == "checkpoint_0002_000000.pth.tar"


def test_save_refuses_a_missing_folder(checkpoints, tmp_path):
    checkpoints.save(content(1))
    shutil.rmtree(tmp_path)
    assert (
        f"{tmp_path}/checkpoint_0002_000000.pth.tar: No such file or directory; the folder is gone"
        in refused(checkpoints.save, content(2))
    )
    assert not tmp_path.exists()


def test_save_first_removes_half_written_files(checkpoints, tmp_path, monkeypatch):
    for name in (
        "checkpoint_0001_000000.pth.tar.new",
        "checkpoint_0009_000003.pth.tar.new",
        f"{BEST}.new",
    ):
        (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / f"{LAST}.new").symlink_to("nowhere")
    save, seen = torch.save, []
    monkeypatch.setattr(
        torch, "save", lambda value, file: (seen.append(os.listdir(tmp_path)), save(value, file))
    )
    checkpoints.save(content(1), best=True)
    assert seen == [["checkpoint_0001_000000.pth.tar.new"]]


# Loading any file.

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def written(path, value, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


@LEGACY
def test_load_reads_both_formats_of_torch(tmp_path, legacy):
    assert same(load(written(tmp_path / "x", content(), legacy)), content())


@LEGACY
def test_load_refuses_a_cut_file(tmp_path, legacy):
    path = written(tmp_path / "x.pth.tar", content(), legacy)
    data = open(path, "rb").read()
    for length in [*range(0, len(data) - 1, 13), len(data) - 1]:
        with open(path, "wb") as file:
            file.write(data[:length])
        assert path in refused(load, path), length


def test_load_ignores_or_refuses_a_flipped_bit(tmp_path):
    path = written(tmp_path / "x.pth.tar", {"epoch": 1, "w": torch.arange(50.0)})
    data = bytearray(open(path, "rb").read())
    expected, errors = load(path), 0
    for offset in range(len(data)):
        changed = data.copy()
        changed[offset] ^= 8
        with open(path, "wb") as file:
            file.write(changed)
        try:
            assert same(load(path), expected), offset
        except RunError as error:
            assert "\n" not in str(error)
            errors += 1
    assert errors > len(data) / 3


def test_load_refuses_flipped_bits_of_a_tensor(tmp_path):
    value = torch.full((1000,), 1.5)
    path = written(tmp_path / "x.pth.tar", {"w": value})
    data = open(path, "rb").read()
    start = data.index(value.numpy().tobytes()[:64])
    for offset in (start, start + 1234, start + 3999):
        flip(path, offset, 0)
        message = refused(load, path)
        assert path in message
        assert "damaged" in message
        flip(path, offset, 0)


class Code:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("inside", [False, True])
def test_load_runs_no_code(tmp_path, form, inside):
    trace = tmp_path / "trace"
    value = (
        {"epoch": 1, "state_dict": {"w": torch.ones(2)}, "x": Code(trace)}
        if inside
        else Code(trace)
    )
    path = str(tmp_path / "x.pth.tar")
    if form == "pickle":
        with open(path, "wb") as file:
            pickle.dump(value, file, protocol=2)
    else:
        written(path, value, legacy=form == "legacy")
    message = refused(load, path)
    assert not trace.exists()
    assert path in message
    if form != "pickle":
        assert "code" in message


HEX = b"c_codecs\nencode\n"  # twice as many bytes each time


def number(value):
    """Return an integer's bytes in a pickle."""
    return b"\x8a\x08" + struct.pack("<q", value)


def expanded(length, strides=b"K\0K\0"):
    """Return a tensor's bytes in a pickle: shape (length, 2), storage of 4 numbers."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
    shape = b"(" + number(length) + b"K\2t(" + strides + b"t"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0"
        + shape
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def claims(n):
    """Return bytes of pickles whose values need 2**n bytes.

    They need them at once, or when the value is copied, printed or iterated over.
    """
    pairs = "".join(
        f"h{chr(index)}h{chr(index)}\x86q{chr(index + 1)}" for index in range(n)
    ).encode("latin1")
    meta = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
    return {
        "zeros": b"cbuiltins\nbytearray\n" + number(2**n) + b"\x85R",
        "zeros, by an older name": b"c__builtin__\nbytearray\n" + number(2**n) + b"\x85R",
        "a new tensor": b"ctorch\nFloatTensor\n" + number(2 ** (n - 2)) + b"\x85R",
        "a new storage": b"ctorch.storage\nUntypedStorage\n" + number(2**n) + b"\x85R",
        "a tensor that repeats a number": expanded(2 ** (n - 3)),
        "many such tensors": b"(" + expanded(2 ** (n - 8)) * 32 + b"t",
        "a set of a tensor's rows": b"cbuiltins\nset\n" + expanded(2 ** (n - 3)) + b"\x85R",
        "a dictionary of a tensor's rows": b"ccollections\nOrderedDict\n"
        + expanded(2 ** (n - 3))
        + b"\x85R",
        "a tensor of no device": meta + b"(" + number(2 ** (n - 2)) + b"t(K\1t\x89tR",
        "text that doubles": HEX * (n + 1)
        + b"X\1\0\0\0aX\6\0\0\0latin1\x86R"
        + b"X\3\0\0\0hex\x86R" * n,
        "containers that double": b"(]q\0" + pairs + b"t",
    }


def claiming(path, piece, compression=zipfile.ZIP_STORED, storage=bytes(16)):
    """Write a file like torch's, whose dictionary has the value of some bytes of a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [
            ("data.pkl", b"\x80\2}X\1\0\0\0x" + piece + b"s."),
            ("version", b"3\n"),
            ("data/0", storage),
        ]:
            archive.writestr(f"archive/{name}", data)
    return str(path)


@pytest.mark.parametrize("claim", claims(10))
def test_load_limits_the_memory_of_a_small_file(tmp_path, monkeypatch, claim):
    monkeypatch.setattr(folder, "ROOM", 2**26)  # values that grow step by step fill it
    path, before = str(tmp_path / "x.pth.tar"), resource.getrlimit(resource.RLIMIT_AS)
    assert "x" in load(claiming(path, claims(10)[claim]))
    assert f"{path} is not a complete checkpoint" in refused(
        load, claiming(path, claims(34)[claim])
    )
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "piece", [b"]q\0h\0a", expanded(2**31, b"K\2K\1")], ids=["a list in itself", "beyond a storage"]
)
def test_load_refuses_endless_values(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(folder, "ROOM", 2**26)
    assert "is not a complete checkpoint" in refused(load, claiming(tmp_path / "x.pth.tar", piece))


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2], ids=["deflated", "bzip2"]
)
def test_load_refuses_a_compressed_large_tensor(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(folder, "ROOM", 2**25)
    declared = expanded(2**23, b"K\2K\1").replace(b"cpuK\4", b"cpu" + number(2**24))
    path = claiming(tmp_path / "x.pth.tar", declared, compression, bytes(2**26))
    assert os.path.getsize(path) < 2**20
    assert f"{path} is not a complete checkpoint" in refused(load, path)


def test_load_reads_moderately_expanded_tensors(tmp_path):
    value = torch.ones(()).expand(1000, 1000)
    path = written(tmp_path / "x.pth.tar", {"w": value, "again": [value, value]})
    assert os.path.getsize(path) < 10_000
    assert torch.equal(load(path)["again"][1], torch.ones(1000, 1000))


@pytest.mark.parametrize(
    "value", [[torch.ones(2)], torch.ones(2), 3, "text", None, (1, 2)], ids=str
)
@LEGACY
def test_load_refuses_a_value_other_than_dictionary(tmp_path, value, legacy):
    path = written(tmp_path / "x.pth.tar", value, legacy)
    message = refused(load, path)
    assert path in message
    assert type(value).__name__ in message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"PK",
        b"PK\x03\x04",
        b"text that is no checkpoint\nat all\n",
        bytes(10_000),
        bytes(range(256)) * 20,
        b"\x80\x02",
        b"\x80\x02}q\x00.",
        b"\x80\x04\x95",
        b"PK\x05\x06" + bytes(18),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        pickle.dumps({"epoch": 1}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_load_refuses_other_files(tmp_path, data):
    path = tmp_path / "x.pth.tar"
    path.write_bytes(data)
    assert str(path) in refused(load, str(path))


def test_load_of_a_page_reports_no_objects(tmp_path):
    """Torch's own error is the same for a page that begins with # and for a newer pickle."""
    path = tmp_path / "README.md"
    path.write_text("# A page\n")
    message = refused(load, str(path))
    assert message == f"{path} is not a complete checkpoint (UnpicklingError): use another one"


NO_FILES = {
    "missing": (
        lambda path: None,
        "x.pth.tar: no such file; expected a checkpoint. Check the path",
    ),
    "link to nowhere": (
        lambda path: path.symlink_to("nowhere"),
        "x.pth.tar: no such file; expected a checkpoint. Check the path",
    ),
    "pipe": (os.mkfifo, "x.pth.tar: not a regular file; expected a checkpoint. Check the path"),
    "folder": (lambda path: path.mkdir(), "x.pth.tar: is a folder; expected a checkpoint file"),
}


@pytest.mark.parametrize("made", NO_FILES)
def test_load_refuses_a_path_without_file(tmp_path, made):
    make, message = NO_FILES[made]
    make(tmp_path / "x.pth.tar")
    assert refused(load, str(tmp_path / "x.pth.tar")) == f"{tmp_path}/{message}"


def test_load_of_a_folder_names_its_newest_checkpoint(checkpoints, tmp_path):
    last = tmp_path / LAST
    last.symlink_to("nowhere")
    assert str(last) not in refused(load, str(tmp_path))
    checkpoints.save(content())
    assert (
        refused(load, f"{tmp_path}/")
        == f"{tmp_path}/: is a folder; expected a checkpoint file, such as {last}"
    )
