"""The study's image folders."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from job.data.folders import scan, scan_validation
from job.errors import RunError
from job.study import data


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "mnist"
    data.prepare("mnist", folder, 700, lambda line: None)
    return folder


@pytest.mark.slow
def test_mnist_is_complete_and_split(mnist):
    train = scan(str(mnist), "train")
    val = scan_validation(str(mnist), train)
    assert len(train) + len(val) == 5000 and train.classes == [str(digit) for digit in range(10)]
    assert 800 < len(val) < 1200
    counts = np.bincount(np.concatenate([train.labels, val.labels]))
    assert counts.tolist() == [500] * 10
    assert train.read(0)[0].shape == (28, 28, 3)


@pytest.mark.slow
def test_existing_folder_is_kept(mnist):
    log = []
    before = data.digest(mnist)
    data.prepare("mnist", mnist, 700, log.append)
    assert not log and data.digest(mnist) == before


def test_digest_depends_on_names_and_images(tmp_path):
    digests = set()
    for name, content in (("a", b"000"), ("b", b"000"), ("b", b"001")):
        folder = tmp_path / f"{name}{content.decode()}"
        (folder / "train" / "x").mkdir(parents=True)
        (folder / "train" / "x" / name).write_bytes(content)
        digests.add(data.digest(folder))
    assert len(digests) == 3


@pytest.fixture(scope="module")
def clipart(tmp_path_factory):
    """A folder as openclipart's: a large, a small, a damaged and an ignored category."""
    root = tmp_path_factory.mktemp("clipart")
    for category, number in (("animals", 12), ("few", 3), ("broken", 5), ("unsorted", 20)):
        folder = root / category / "deeper"
        folder.mkdir(parents=True)
        for n in range(number):
            pixels = np.full((30 + n, 200, 4), n * 9, dtype=np.uint8)
            pixels[..., 3] = 0 if n % 2 else 255
            Image.fromarray(pixels).save(folder / f"{n}.png")
    for n in range(2):
        (root / "broken" / f"{n}.png").write_bytes(b"none")
    return root


@pytest.fixture
def drawings(clipart, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CLIPART", clipart)
    monkeypatch.setattr(data, "FEWEST", 6)
    monkeypatch.setattr(data, "MOST", 10)
    log = []
    data.prepare("clipart", tmp_path / "clipart", 700, log.append)
    return tmp_path / "clipart", log


def test_drawings_are_reduced_and_on_white(drawings):
    folder, log = drawings
    files = sorted(folder.glob("*/animals/*.png"))
    assert len(files) == 10 == len(list(folder.glob("*/*/*")))  # MOST, and of no other category
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "RGB" and min(image.size) == 72 and image.size[0] > 250
    whites = [np.asarray(Image.open(file)).min() == 255 for file in files]
    assert 3 <= sum(whites) <= 7  # the transparent ones
    assert any("broken skipped: 5 readable drawings, expected 6" in line for line in log)
    assert any("animals, 10 of 12 drawings" in line for line in log)


def test_names_and_split_follow_from_file_names(drawings):
    folder, _ = drawings
    names = {hashlib.sha256(f"animals/deeper/{n}.png".encode()).hexdigest()[:16] for n in range(12)}
    for file in folder.glob("*/*/*"):
        assert file.stem in names
        held_out = int(hashlib.sha256(file.stem.encode()).hexdigest()[:16], 16) % data.HELD_OUT == 0
        assert file.parts[-3] == ("val" if held_out else "train")


def test_most_limits_only_training_images(drawings, tmp_path):
    complete, _ = drawings
    log = []
    data.prepare("clipart", tmp_path / "fewer", 3, log.append)
    for split, most in (("train", 3), ("val", 10)):
        expected = sorted(path.name for path in (complete / split / "animals").iterdir())
        assert split == "val" or len(expected) > 3
        fewer = sorted(path.name for path in (tmp_path / "fewer" / split / "animals").iterdir())
        assert fewer == expected[:most]
    assert "3 images to train on" in log[-1]


def test_missing_package_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CLIPART", tmp_path / "none")
    (tmp_path / "clipart.part" / "train").mkdir(parents=True)
    with pytest.raises(RunError, match="apt-get install openclipart-png"):
        data.prepare("clipart", tmp_path / "clipart", 700, lambda line: None)
    assert not (tmp_path / "clipart").exists()


def names(folder, split):
    return {str(path.relative_to(folder / split)) for path in folder.glob(f"{split}/*/*")}


def test_choose_measures_on_images_of_train(tmp_path, monkeypatch):
    written = [(label, data.key(f"{number}")) for label in "AB" for number in range(100)]

    def write(folder, log):
        for label, name in written:
            data.write(folder, label, name, np.zeros((2, 2), np.uint8))

    monkeypatch.setitem(data.SETS, "mnist", write)
    folders = {split: tmp_path / split for split in (data.TEST, data.CHOOSE)}
    for split, folder in folders.items():
        data.prepare("mnist", folder, 50, lambda line: None, split)
    test, choose = folders.values()
    data.prepare("mnist", tmp_path / "all", 700, lambda line: None)
    held = names(choose, "val")
    assert held and held < names(tmp_path / "all", "train")
    assert not names(test, "val") & (held | names(choose, "train"))
    assert not held & names(choose, "train")
    assert names(choose, "train") <= names(tmp_path / "all", "train")
    files = Counter(name.split("/")[1] for name in held)
    assert set(files.values()) == {2}  # a name, such as a font's, has one split in all classes
    written_names = {f"{data.key(f'{n}')}.png" for n in range(100)}
    candidates = written_names & {name.split("/")[1] for name in names(tmp_path / "all", "train")}
    hashes = {name: int(data.key(f"choose {name.removesuffix('.png')}"), 16) for name in candidates}
    assert files.keys() == {name for name, value in hashes.items() if value % data.HELD_OUT == 0}
    assert len(list((choose / "train" / "A").iterdir())) == 50
