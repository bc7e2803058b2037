"""Rows in a folder from which a killed program resumes."""

import errno
import json

import numpy as np
import pytest

from job.errors import RunError
from job.evaluate import rows as module
from job.evaluate.rows import JOURNAL, ORIGIN, ROWS, Rows

ORIGIN_OF = {"network": "1234", "image_size": 32, "images": 12}
GROUPS = [(3, {}), (0, {3: "cut short", 4: "no image"}), (2, {7: "ü\udcff"}), (4, {})]


def made(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """A folder with all of GROUPS."""
    rows = Rows(str(tmp_path / "out.part"), ORIGIN_OF, 5)
    assert rows.open() == (0, {})
    for number, (count, bad) in enumerate(GROUPS):
        rows.append(made(count, number), bad)
    rows.close()
    return tmp_path / "out.part"


def reopened(folder, origin=ORIGIN_OF, width=5):
    """Return the rows in a folder, and the result of their `open`."""
    rows = Rows(str(folder), origin, width)
    return rows, rows.open()


def check(rows, done):
    """Check that the first `done` groups are equal, to the bit."""
    groups = list(rows.groups())
    assert len(groups) == done
    for number, group in enumerate(groups):
        assert group.tobytes() == made(GROUPS[number][0], number).tobytes()
    assert rows.count == sum(count for count, _ in GROUPS[:done])


def test_rows_are_read_back(folder):
    rows, (done, bad) = reopened(folder)
    assert (done, bad) == (4, {3: "cut short", 4: "no image", 7: "ü\udcff"})
    check(rows, 4)


@pytest.mark.parametrize("name", [JOURNAL, ROWS])
def test_rows_resume_after_any_cut(folder, name):
    """Groups computed again give the bytes of an uninterrupted program."""
    full = {each: (folder / each).read_bytes() for each in (JOURNAL, ROWS)}
    lines = full[JOURNAL].splitlines(keepends=True)
    ends = [json.loads(line)["end"] * 20 for line in lines] if name == ROWS else []
    ends = ends or [len(b"".join(lines[: number + 1])) for number in range(len(lines))]
    for size in range(0, len(full[name]), 7):
        for each, content in full.items():
            (folder / each).write_bytes(content)
        (folder / name).write_bytes(full[name][:size])
        rows, (done, _) = reopened(folder)
        assert done == sum(end <= size for end in ends)
        check(rows, done)
        for number in range(done, len(GROUPS)):
            rows.append(made(GROUPS[number][0], number), GROUPS[number][1])
        rows.close()
        assert {each: (folder / each).read_bytes() for each in full} == full


def test_rows_with_a_wrong_checksum_are_recomputed(folder):
    content = bytearray((folder / ROWS).read_bytes())
    content[3 * 20 + 5] ^= 1
    (folder / ROWS).write_bytes(content)
    rows, (done, bad) = reopened(folder)
    assert (done, bad) == (2, {3: "cut short", 4: "no image"})
    check(rows, 2)


@pytest.mark.parametrize(
    "line",
    [
        *(
            "",
            "{}",
            "[]",
            "null",
            '{"end": 1}',
            '{"end": "a", "crc32": 0, "undecodable": []}',
            "\xff",
        ),
        *(
            '{"end": 2, "crc32": 0, "undecodable": []}',
            f'{{"end": {10**30}, "crc32": 0, "undecodable": []}}',
        ),
        *(
            f'{{"end": 3, "crc32": 0, "undecodable": {actual}}}'
            for actual in (
                "1",
                "{}1",
                "[1]",
                "[[1]]",
                '[["1", "cut"]]',
                "[[1, 2]]",
                '[[12, ""]]',
                '[[-1, ""]]',
                '[[true, ""]]',
                "[" * 10**5,
            )
        ),
    ],
    ids=lambda line: line[:60],
)
def test_rows_end_at_a_damaged_line(folder, line):
    lines = (folder / JOURNAL).read_bytes().splitlines()
    lines[1] = line.encode("latin-1")
    (folder / JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    rows, (done, _) = reopened(folder)
    assert done == 1
    check(rows, 1)


def test_rows_that_change_while_read_are_an_error(folder):
    rows, _ = reopened(folder)
    (folder / ROWS).write_bytes(b"\0" * (folder / ROWS).stat().st_size)
    with pytest.raises(RunError, match="group 0 have changed") as caught:
        list(rows.groups())
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("origin", "parts"),
    [
        (ORIGIN_OF | {"network": "99"}, ["another checkpoint", "1234, now 99"]),
        (ORIGIN_OF | {"image_size": 64}, ["another image_size", "32, now 64"]),
    ],
)
def test_rows_refuse_another_origin(folder, origin, parts):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError) as caught:
        reopened(folder, origin)
    assert all(part in str(caught.value) for part in [*parts, str(folder), "Remove it"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}", b"\xff"])
def test_rows_refuse_another_folder(tmp_path, content):
    (tmp_path / "mine").touch()
    if content is not None:
        (tmp_path / ORIGIN).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match="not a folder of job.embed"):
        reopened(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_rows_restart_after_an_early_kill(tmp_path):
    (tmp_path / f"{ORIGIN}.new").write_text("{")
    assert reopened(tmp_path)[1] == (0, {})


def test_rows_allow_one_process_at_a_time(folder):
    first, _ = reopened(folder)
    with pytest.raises(RunError, match="another process"):
        reopened(folder)
    first.close()
    reopened(folder)


def test_rows_refuse_an_impossible_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to .*. Choose another --out"):
        reopened(tmp_path / "file")


def test_rows_survive_a_full_disk(folder, monkeypatch):
    rows, _ = reopened(folder)
    before = module.write

    def full(file, content):
        before(file, content[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    with pytest.raises(RunError, match=r"No space left on device. Make room") as caught:
        rows.append(made(3, 9), {})
    assert caught.value.code == 1
    rows.close()
    check(reopened(folder)[0], 4)


def test_rows_remove_their_folder(folder):
    reopened(folder)[0].remove()
    assert not folder.exists()
