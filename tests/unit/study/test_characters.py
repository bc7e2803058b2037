"""The study's set of letters in many fonts."""

import shutil
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from job.errors import RunError
from job.study import characters, data

OWN = Path(matplotlib.get_data_path(), "fonts", "ttf")


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """Folder and log of a set: three families, two unsuitable fonts, a damaged file."""
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    alike = ("DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique")
    for name in (*alike, "cmtt10", "STIXGeneral", "cmr10", "STIXSizOneSymReg"):
        shutil.copy(OWN / f"{name}.ttf", fonts)
    (fonts / "damaged.ttf").write_bytes((OWN / "cmtt10.ttf").read_bytes()[:100])
    monkeypatch.setattr(characters, "FONTS", fonts)
    log = []
    data.prepare("characters", tmp_path / "characters", 700, log.append)
    return tmp_path / "characters", log


def test_letters_have_one_font_of_each_family(letters):
    folder, log = letters
    files = list(folder.glob("*/*/*.png"))
    assert Counter(path.parent.name for path in files) == dict.fromkeys(characters.LETTERS, 3)
    expected = {
        data.key(f"{name}.ttf") for name in ("DejaVuSansMono-Bold", "cmtt10", "STIXGeneral")
    }
    assert {path.stem for path in files} == expected
    skipped = "1 unreadable, 2 with unsuitable letters, 1 of the same family"
    assert log[1] == f"characters: 3 fonts of 7; skipped: {skipped}"


def test_letters_are_black_on_white_and_fill_the_box(letters):
    folder, _ = letters
    for path in folder.glob("*/*/*.png"):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (characters.SIDE,) * 2 and pixels.dtype == np.uint8
        rows, columns = np.nonzero(pixels < 255)
        extents = [int(np.ptp(axis)) + 1 for axis in (rows, columns)]
        assert max(extents) == characters.BOX
        for axis, extent in zip((rows, columns), extents, strict=True):
            assert abs(axis.min() - (characters.SIDE - extent) // 2) <= 1
        assert pixels.min() < 64


def test_letters_of_a_font_have_one_split(letters):
    folder, _ = letters
    splits = Counter((path.stem, path.parts[-3]) for path in folder.glob("*/*/*.png"))
    assert list(splits.values()) == [26] * 3
    assert {split for _, split in splits} == {"train", "val"}


def test_font_with_identical_letters_is_skipped(tmp_path, monkeypatch):
    shutil.copy(OWN / "cmtt10.ttf", tmp_path)
    monkeypatch.setattr(characters, "FONTS", tmp_path)
    monkeypatch.setattr(characters, "LETTERS", "ABA")
    log = []
    assert not list(characters.draw_characters(log.append))
    assert "1 with unsuitable letters" in log[0]


def test_pieces_counts_regions_of_ink():
    image = np.full((characters.SIDE,) * 2, 255, dtype=np.uint8)
    assert characters.pieces(image) == 0
    image[4:8, 4:8] = image[8:12, 8:12] = 0  # they touch at a corner
    assert characters.pieces(image) == 1
    image[20:24, 4:8] = 0
    assert characters.pieces(image) == 2


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(characters, "FONTS", tmp_path / "none")
    with pytest.raises(RunError, match=r"characters: no fonts in .* apt-get install fonts-aenigma"):
        data.prepare("characters", tmp_path / "characters", 700, lambda line: None)


@pytest.mark.slow
@pytest.mark.skipif(not characters.FONTS.is_dir(), reason="apt-get install fonts-aenigma")
def test_package_has_many_families(tmp_path):
    data.prepare("characters", tmp_path / "characters", 700, lambda line: None)
    fonts = []
    for split in ("train", "val"):
        labels = list((tmp_path / "characters" / split).iterdir())
        names = [{path.name for path in label.iterdir()} for label in labels]
        assert len(labels) == 26 and all(own == names[0] for own in names)
        fonts.append(names[0])
    assert len(fonts[0]) > 100 and len(fonts[1]) > 20 and not fonts[0] & fonts[1]
