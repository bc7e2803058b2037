"""All images of a folder, numbered over its splits."""

from types import SimpleNamespace

import pytest

from job.data.images import Names
from job.data.splits import Splits, find_images
from job.errors import RunError
from job.metrics.log import Log
from job.pack import Options, pack


def images(*names):
    """Return a set of images that has names only."""

    class Some(SimpleNamespace):
        def __len__(self):
            return len(names)

    return Some(names=Names.of(list(names)))


def test_splits_number_all_images():
    splits = Splits({"train/": images("a/1", "b/2"), "val/": images("a/1")})
    assert [splits.path(number) for number in range(len(splits))] == [
        "train/a/1",
        "train/b/2",
        "val/a/1",
    ]


def test_splits_of_a_plain_folder_have_no_prefix():
    splits = Splits({"": images("a/1", "2")})
    assert [splits.path(number) for number in range(len(splits))] == ["a/1", "2"]


def test_splits_digest_depends_on_all_paths():
    sets = [
        {"train/": images("a", "b")},
        {"train/": images("ab")},
        {"train/": images("b", "a")},
        {"val/": images("a", "b")},
        {"train/": images("a"), "val/": images("b")},
    ]
    assert len({Splits(each).digest for each in sets}) == len(sets)
    assert Splits(sets[0]).digest == Splits({"train/": images("a", "b")}).digest


def test_find_images_keeps_the_order_of_splits(tmp_path):
    for name in ("val/a/3.png", "train/b/2.png", "train/a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    splits = Splits(find_images(str(tmp_path)))
    paths = [splits.path(number) for number in range(len(splits))]
    assert paths == ["train/a/1.png", "train/b/2.png", "val/a/3.png"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["2.png", "a/1.png", "val/a/3.png"], ["2.png", "a/1.png", "val/a/3.png"]),
        (["deep/er/1.png", "valid/2.png"], ["deep/er/1.png", "valid/2.png"]),
        (["notes.txt", "val/a/3.png", "valid/4.png"], ["val/a/3.png", "valid/4.png"]),
        (["1.png", "train/a/2.png", "val/a/3.png"], ["train/a/2.png", "val/a/3.png"]),
        (["1.png", "a/2.png"], ["1.png", "a/2.png"]),
    ],
)
def test_find_images_includes_images_without_train(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    splits = Splits(find_images(str(tmp_path)))
    assert [splits.path(number) for number in range(len(splits))] == expected


def test_find_images_includes_shards_without_train(tmp_path):
    for name in ("a/1.png", "val/a/2.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    log = Log(speaks=False)
    pack(str(tmp_path / "in"), str(tmp_path / "out"), Options(shard_images=1), log)
    for file in (tmp_path / "out" / "train").iterdir():
        file.rename(tmp_path / "out" / file.name)
    (tmp_path / "out" / "train").rmdir()
    splits = Splits(find_images(str(tmp_path / "out")))
    assert [splits.path(number) for number in range(len(splits))] == ["a/1.png", "val/a/2.png"]


def test_find_images_refuses_an_empty_folder(tmp_path):
    with pytest.raises(RunError, match="expected"):
        find_images(str(tmp_path))
