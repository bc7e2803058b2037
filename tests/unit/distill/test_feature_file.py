"""A file of features as the teacher: reading, matching of paths, errors, digest, and targets."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from errors import refused
from runs import Kept

from job.config import Config
from job.data.image_files import ImageFolder
from job.data.joined import JoinedImages
from job.distill import DISTILLERS
from job.distill import feature_file
from job.distill.feature_file import Rows
from job.distill.feature_teacher import FeatureTeacher, find_rows, load_features, match
from job.distill.fit import check_fit
from job.distill.options import is_feature_file
from job.errors import WorkerError
from job.files import ReadError
from job.networks import network_outline

NAMES = ["a/0.png", "a/1.png", "b/2.png", "b/\udcff.png"]
N, T = len(NAMES), 3
ROWS = np.arange(N * T, dtype=np.float32).reshape(N, T)


def folder(root="data/train", names=NAMES):
    return ImageFolder(root, [], list(names), [-1] * len(names), 0)


def write(path, rows=ROWS, paths=NAMES, prefix="train/", **about):
    """Write an array and its paths, as job.embed does. Return the array's path."""
    np.save(path, rows)
    content = {**about, "paths": [prefix + each for each in paths]}
    path.with_suffix(".json").write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher.npy"


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [("t.npy", True), ("a.b/t.NPY", True), ("t.parquet", True), ("t.pth.tar", False), ("", False)],
)
def test_ending_decides(teacher, expected):
    assert is_feature_file(teacher) is expected


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_rows_are_those_of_the_array(path, dtype):
    rows = Rows(write(path, ROWS.astype(dtype)))
    actual = rows.read([2, 0, -1, 2])
    assert actual.dtype == np.float32 and rows.shape == (N, T)
    assert np.array_equal(actual, np.stack([ROWS[2], ROWS[0], 0 * ROWS[0], ROWS[2]]))


# Images of a run, and the prefix of the file's paths.
PLACES = {
    "a folder with splits": (folder(), "train/"),
    "a split": (folder(), ""),
    "a folder without splits": (folder("data"), ""),
    "the folder above": (folder("some/photos"), "photos/"),
    "the validation split": (folder("data/val"), "val/"),
    "a list": (folder("list.txt"), ""),
    "a slash at the end": (folder("some/photos/"), "photos/"),
}


@pytest.mark.parametrize(("images", "prefix"), PLACES.values(), ids=PLACES)
def test_images_are_matched_by_name(path, images, prefix):
    """The file has the rows in another order, and rows of other images."""
    order = [2, 0, 3, 1]
    paths = [prefix + NAMES[number] for number in order]
    others = [f"val/{name}" for name in NAMES] if prefix != "val/" else []
    found = find_rows(write(path, ROWS[order + order[: len(others)]], paths + others, ""), images)
    assert np.array_equal(ROWS[order][found.numbers], ROWS) and found.shape[1] == T


def test_undecodable_images_have_no_row(path):
    bad = [["train/a/1.png", "no image of a known format"]]
    found = find_rows(write(path, ROWS[[0, 2, 3]], np.delete(NAMES, 1), undecodable=bad), folder())
    assert found.numbers.tolist() == [0, -1, 1, 2]


def test_image_twice_in_a_list_has_one_row(path):
    found = find_rows(write(path, prefix=""), folder("list.txt", [*NAMES, NAMES[1]]))
    assert found.numbers.tolist() == [0, 1, 2, 3, 1]


def test_two_images_of_one_name_are_refused():
    both = JoinedImages([folder("one", ["x.png"]), folder("two", ["x.png"])], 0)
    message = refused(match, "t.npy", ["x.png"], set(), both)
    assert message.startswith("--teacher t.npy: one/x.png and two/x.png have one name; expected")


def rewritten(text):
    """Return a function that writes a good array and another .json file."""

    def make(path):
        write(path)
        path.with_suffix(".json").write_text(text)

    return make


def headed(header):
    """Return a function that writes a file with another header."""

    def make(path):
        text = header.encode().ljust(117) + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)

    return make


def without_paths(path):
    np.save(path, ROWS)


def cut(path):
    write(path)
    path.write_bytes(path.read_bytes()[:-1])


def damaged(path):
    """numpy raises a TokenError for a bracket without its end."""
    write(path)
    path.write_bytes(path.read_bytes().replace(b"}", b" "))


def pickled(path):
    write(path, np.array([[{}]] * N, dtype=object))


def archive(path):
    write(path)
    with path.open("wb") as file:
        np.savez(file, ROWS)


# What is wrong: the function that makes the file, and parts of the error.
ERRORS = {
    "missing": (lambda path: None, "No such file or directory"),
    "no array": (lambda path: path.write_bytes(b"some text"), "no NumPy array; expected an array"),
    "empty": (lambda path: path.write_bytes(b""), "no NumPy array; expected an array"),
    "damaged header": (damaged, "no NumPy array; expected an array"),
    "archive": (archive, "no NumPy array; expected an array"),
    "open bracket": (headed("{'descr': '<f4', ("), "no NumPy array; expected an array"),
    "no type": (headed("{'descr': '?9', 'fortran_order': 0, 'shape': ()}"), "no NumPy array"),
    "impossible": (
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + 50 * "f" + ", 3)}"),
        "no NumPy array; expected an array",
    ),
    "objects": (pickled, "of object; expected an array (images, features) of floats"),
    "whole numbers": (partial(write, rows=ROWS.astype(int)), "an array (4, 3) of int64; expected"),
    "one dimension": (partial(write, rows=ROWS[:, 0]), "an array (4,) of float32; expected"),
    "no rows": (partial(write, rows=ROWS[:0], paths=[]), "an array (0, 3) of float32; expected"),
    "columns first": (
        partial(write, rows=np.asfortranarray(ROWS)),
        "an array in Fortran's order; expected one in C's order, as numpy.ascontiguousarray",
    ),
    "cut": (cut, "175 bytes; expected 176, as its header says"),
    "no paths": (without_paths, "no ", "teacher.json next to it; expected the paths of its images"),
    "no JSON": (rewritten("paths"), "teacher.json has no paths; expected a list"),
    "deep JSON": (rewritten("[" * 10**5), "teacher.json has no paths; expected a list"),
    "a list": (rewritten("[]"), "teacher.json has no paths; expected a list"),
    "numbers": (rewritten('{"paths": [1, 2, 3, 4]}'), "teacher.json has no paths; expected"),
    "fewer paths": (partial(write, paths=NAMES[:3]), "4 rows and 3 paths in ", "; expected equal"),
    "another folder": (
        partial(write, prefix="other/"),
        "no row for 4 of 4 images, such as data/train/a/0.png; expected features of all images of "
        "data/train; the file has other/a/0.png. Run job.embed",
    ),
    "some images": (
        partial(write, rows=ROWS[:2], paths=NAMES[:2]),
        "no row for 2 of 4 images, such as data/train/b/2.png",
    ),
}


@pytest.mark.parametrize(("make", "parts"), [(e[0], e[1:]) for e in ERRORS.values()], ids=ERRORS)
def test_unusable_files_are_refused(path, make, parts):
    make(path)
    message = refused(find_rows, str(path), folder())
    assert message.startswith(f"--teacher {path}: ") and all(part in message for part in parts)
    assert "job.embed" in message


def test_parquet_is_refused():
    message = refused(find_rows, "t.parquet", folder())
    assert message.startswith("--teacher t.parquet: .parquet cannot be read by rows; expected")
    assert "--out FILE.npy" in message


class StandIn:
    """A run of one worker."""

    rank, size = 0, 1

    def __init__(self):
        self.log = Kept()

    def on_first(self, work):
        return work()

    on_all = on_first


def load(path, distill="simreg", run=None, **options):
    config = Config(data="data", teacher=path, distill=[distill], **options)
    return load_features(config, [DISTILLERS[distill]], folder(), run or StandIn())


def test_digest_is_of_rows_and_paths(tmp_path):
    """It does not depend on the place of the file, or on what else its .json file has."""

    def digest(name, *arguments, **options):
        (tmp_path / name).mkdir()
        return load(write(tmp_path / name / "t.npy", *arguments, **options)).digest

    changed = ROWS.copy()
    changed[3, 2] += 1
    first = digest("0")
    assert digest("1", arch="resnet50") == first and len(first) == 16
    others = [digest("2", changed), digest("3", paths=NAMES[::-1]), digest("4", prefix="")]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("block", [1, 2 * 4 * T, 2**24])
def test_workers_check_all_blocks(path, monkeypatch, block):
    """Together they return the digests of one worker, and find a row that is not finite."""
    monkeypatch.setattr(feature_file, "BLOCK", block)
    rows = ROWS.copy()
    rows[2, 1] = np.nan
    file = Rows(write(path, rows))
    alone, invalid = file.check(0, 1)
    assert invalid == 2
    shares = [file.check(rank, 3) for rank in range(3)]
    together = [""] * len(alone)
    for rank, (own, _) in enumerate(shares):
        together[rank::3] = own
    assert together == alone and sorted(found for _, found in shares) == [-1, -1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_must_be_finite_floats(path, value):
    rows = ROWS.astype(np.float64)
    rows[1, 2] = value
    message = refused(load, write(path, rows))
    assert message.startswith(f"--teacher {path}: row 1, of data/train/a/1.png, has values that")


def test_teacher_is_recorded(path):
    """Its options are those of a teacher without network, head and maps."""
    run = StandIn()
    teacher = load(write(path, arch="resnet50", features="outputs of the head"), run=run)
    assert teacher.widths == {"pooled": T} and not teacher.has_head and teacher.state() == {}
    [record] = run.log.of_kind("teacher")
    assert record == {"kind": "teacher", "arch": "features of resnet50", "path": str(path)}
    [line] = run.log.lines
    shown = (
        f"teacher {path}: 4 rows of 3 features (resnet50, outputs of the head), without a network"
    )
    assert line.startswith(shown)


def test_file_that_becomes_shorter_is_an_error(path, monkeypatch):
    monkeypatch.setattr("job.files.PAUSES", ())
    rows = Rows(write(path))
    cut(path)
    with pytest.raises(ReadError, match=f"^cannot read {path}: the file has become shorter"):
        rows.read([3])


def test_worker_whose_disk_fails_prints_the_error(path, monkeypatch):
    """Only rank 0 prints a RunError, and it may read other rows."""
    monkeypatch.setattr("job.files.PAUSES", ())
    teacher = load(write(path))
    cut(path)
    with pytest.raises(WorkerError, match=f"^cannot read {path}: the file has become") as caught:
        teacher.features(torch.zeros(1, 3, 2, 2), torch.tensor([3]))
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("distill", "options"), [("disco", {}), ("similarity", {"similarity": "seed"})]
)
def test_distillers_of_heads_are_refused(path, distill, options):
    message = refused(load, write(path), distill, **options)
    start = f"--distill {distill}: needs the teacher's head, and {path} is a file of features; "
    assert message.startswith(start)


@pytest.mark.parametrize("distill", ["mgd", "projector", "gram"])
def test_distillers_of_maps_are_refused(path, distill):
    teacher = load(write(path), distill)
    config = Config(data="data", teacher=str(path), distill=[distill])
    student = network_outline("resnet18", "imagenet", 64, 64)
    message = refused(check_fit, config, [DISTILLERS[distill]], DISTILLERS, student, teacher)
    assert message.startswith(f"--distill {distill}: the teacher (features in {path}) has no maps")
    assert message.endswith(". Use one of: simreg, similarity")


def test_targets_are_the_rows_of_the_images(path):
    teacher = load(write(path, ROWS[::-1], NAMES[::-1]))
    indices = torch.tensor([3, 0, 0, -1])
    features = teacher.features(torch.zeros(4, 3, 2, 2), indices)
    expected = np.stack([ROWS[3], ROWS[0], ROWS[0], 0 * ROWS[0]])
    assert [*features] == ["pooled"] and np.array_equal(features["pooled"], expected)


def test_repaired_image_without_a_row_is_an_error(path):
    bad = [["train/a/1.png", "no image of a known format"]]
    teacher = load(write(path, ROWS[[0, 2, 3]], np.delete(NAMES, 1), undecodable=bad))
    assert isinstance(teacher, FeatureTeacher)
    with pytest.raises(WorkerError) as caught:
        teacher.features(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))
    assert caught.value.code == 2
    start = f"--teacher {path}: no row for data/train/a/1.png, which job.embed"
    assert str(caught.value).startswith(start)
