"""The study's set of characters of writing systems."""

import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from job.errors import RunError
from job.study import data, writing

OWN = Path(matplotlib.get_data_path(), "fonts", "ttf")


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """A folder with a font for each of two systems. Both fonts have many alphabets."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    for system, name in (("A", "DejaVuSans"), ("B", "STIXGeneral")):
        shutil.copy(OWN / f"{name}.ttf", folder / f"NotoSans{system}-Regular.ttf")
    monkeypatch.setattr(writing, "FONTS", folder)
    monkeypatch.setattr(writing, "SYSTEMS", ("A", "B"))
    return folder


def drawn(most=60, log=None):
    lines = [] if log is None else log
    return list(writing.draw_writing(most, data.key, lines.append))


def test_each_system_has_distinct_characters(fonts):
    log = []
    characters = drawn(60, log)
    assert Counter(system for system, _, _ in characters) == {"A": 60, "B": 60}
    for system in "AB":
        own = [(name, image) for each, name, image in characters if each == system]
        assert len({image.tobytes() for _, image in own}) == 60
        assert [name for name, _ in own] == sorted((name for name, _ in own), key=data.key)
        assert all(image.shape == (32, 32) and image.min() < 255 for _, image in own)
    assert [line.split(",")[0] for line in log] == ["writing: A", "writing: B"]


def test_characters_are_not_latin(fonts):
    characters = [chr(int(name.split()[1], 16)) for _, name, _ in drawn()]
    assert {unicodedata.category(each) for each in characters} <= writing.CATEGORIES
    assert not [each for each in characters if unicodedata.name(each).startswith("LATIN")]


def test_identical_characters_appear_once(fonts):
    """The letters A of Greek, Cyrillic and others are identical. All characters are drawn."""
    log: list[str] = []
    images = {name: image.tobytes() for system, name, image in drawn(10**6, log) if system == "A"}
    assert len(set(images.values())) == len(images)
    assert len({"A 391", "A 410"} & images.keys()) <= 1
    kept, total = map(int, log[0].removesuffix(" characters").split(", ")[1].split(" of "))
    assert kept == len(images) < total


def test_characters_are_in_one_split(fonts, tmp_path):
    data.prepare("writing", tmp_path / "writing", 700, lambda line: None)
    train, val = (
        {path.name for path in (tmp_path / "writing" / split).glob("*/*")}
        for split in ("train", "val")
    )
    assert train and val and not train & val
    path = next((tmp_path / "writing").glob("val/A/*"))
    assert np.asarray(Image.open(path)).shape == (32, 32)


def test_missing_and_damaged_fonts_are_named(fonts, monkeypatch):
    path = fonts / "NotoSansB-Regular.ttf"
    font = path.read_bytes()
    for content in (font[:100], b"", b"none"):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"writing: .*NotoSansB-Regular.ttf: .* --reinstall"):
            drawn()
    path.unlink()
    with pytest.raises(RunError, match=r"writing: .*NotoSansB-Regular.ttf: .* --reinstall"):
        drawn()
    monkeypatch.setattr(writing, "FONTS", fonts / "none")
    with pytest.raises(
        RunError, match=r"expected Debian's package. Run apt-get install fonts-noto"
    ):
        drawn()


def test_font_without_unicode_characters_is_named(fonts, monkeypatch):
    monkeypatch.setattr(writing.TTFont, "getBestCmap", lambda font: None)
    expected = r"^writing: .*NotoSansA-Regular.ttf: the font has no Unicode [^\n]* --reinstall"
    with pytest.raises(RunError, match=expected):
        drawn()


@pytest.mark.slow
@pytest.mark.skipif(not writing.FONTS.is_dir(), reason="apt-get install fonts-noto-core")
def test_package_has_enough_characters(tmp_path):
    data.prepare("writing", tmp_path / "writing", 700, lambda line: None)
    for split, least in (("train", 90), ("val", 15)):
        counts = {
            path.name: len(list(path.iterdir()))
            for path in (tmp_path / "writing" / split).iterdir()
        }
        assert counts.keys() == set(writing.SYSTEMS) and min(counts.values()) >= least
