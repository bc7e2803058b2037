"""Files of features and paths."""

import json
import os
import sys

import numpy as np
import pyarrow.parquet
import pytest

from job.errors import RunError
from job.evaluate import tables
from job.evaluate.rows import Rows
from job.evaluate.tables import check_place, write_npy, write_parquet

ABOUT = {"network": "1234", "width": 64, "epoch": None, "undecodable": [["train/x", "cut short"]]}
COUNTS = [3, 0, 2, 1]


@pytest.fixture
def rows(tmp_path):
    rows = Rows(str(tmp_path / "part"), {}, 4)
    rows.open()
    for seed, count in enumerate(COUNTS):
        generator = np.random.default_rng(seed)
        rows.append(generator.normal(size=(count, 4)).astype(np.float32), {})
    return rows


@pytest.fixture
def paths():
    return [f"train/a/{number}.png" for number in range(4)] + [
        "näh\n.png",
        os.fsdecode(b"\xff.png"),
    ]


def test_write_npy_has_rows_and_paths(rows, paths, tmp_path):
    out = str(tmp_path / "features.v1.npy")
    reading = write_npy(out, rows, paths, dict(ABOUT))
    array = np.load(out)
    assert (array.dtype, array.shape) == (np.float32, (6, 4))
    assert array.tobytes() == np.concatenate(list(rows.groups())).tobytes()
    with open(tmp_path / "features.v1.json") as file:
        assert json.load(file) == {**ABOUT, "paths": paths}
    assert out in reading and "features.v1.json" in reading
    np.save(tmp_path / "other.npy", array)
    assert (tmp_path / "other.npy").read_bytes() == (tmp_path / "features.v1.npy").read_bytes()


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_write_parquet_has_rows_in_any_groups(rows, paths, tmp_path, monkeypatch, groups):
    monkeypatch.setattr(tables, "GROUPS", groups)
    out = str(tmp_path / "features.parquet")
    write_parquet(out, rows, paths, dict(ABOUT))
    table = pyarrow.parquet.read_table(out)
    assert table["path"].to_pylist() == [*paths[:-1], r"\xff.png"]
    expected = np.concatenate(list(rows.groups()))
    assert np.array(table["features"].to_pylist(), dtype=np.float32).tobytes() == expected.tobytes()
    shown = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (shown["network"], json.loads(shown["undecodable"])) == (
        "1234",
        [["train/x", "cut short"]],
    )


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
@pytest.mark.parametrize("old", [False, True])
def test_write_interrupted_leaves_no_file(rows, paths, tmp_path, monkeypatch, name, old):
    """An old array is removed before its paths change."""
    out = tmp_path / name
    if old:
        out.write_text("old")

    def interrupted():
        yield next(iter(Rows.groups(rows)))
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tables.FORMATS[tables.ending(name)](str(out), rows, paths, dict(ABOUT))
    assert not (tmp_path / f"{name}.new").exists()
    if name == "f.npy":
        assert not out.exists() and not (tmp_path / "f.json").exists()
    else:
        assert (out.read_text() if out.exists() else None) == ("old" if old else None)


@pytest.mark.parametrize(
    ("out", "parts"),
    [
        ("f", ["--out f", ".npy or .parquet"]),
        ("f.csv", ["f.csv", ".npy or .parquet"]),
        ("no/f.npy", ["no folder no"]),
        ("old.npy", ["old.npy exists", "--force"]),
        ("pair.npy", ["pair.json exists", "--force"]),
        ("folder.npy", ["folder.npy is a folder"]),
    ],
)
def test_check_place_refuses_unwritable_paths(tmp_path, monkeypatch, out, parts):
    monkeypatch.chdir(tmp_path)
    for name in ("old.npy", "pair.json"):
        (tmp_path / name).touch()
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(RunError) as caught:
        check_place(out, force=False)
    assert all(part in str(caught.value) for part in parts)
    assert caught.value.code == 2


@pytest.mark.parametrize("out", ["f.npy", "F.NPY", "f.parquet", "pair.parquet"])
def test_check_place_allows_a_new_file(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair.json").touch()
    check_place(out, force=False)


def test_check_place_force_allows_files_only(tmp_path):
    (tmp_path / "old.npy").touch()
    (tmp_path / "folder.npy").mkdir()
    check_place(str(tmp_path / "old.npy"), force=True)
    with pytest.raises(RunError, match="is a folder"):
        check_place(str(tmp_path / "folder.npy"), force=True)


def test_check_place_needs_pyarrow_for_parquet(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RunError, match=r"pip install '.\[parquet\]'"):
        check_place(str(tmp_path / "f.parquet"), force=False)
    check_place(str(tmp_path / "f.npy"), force=False)
