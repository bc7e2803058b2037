"""Formats that Pillow reads by plug-ins."""

import io

import numpy as np
import pytest
from PIL import Image

from errors import refused
from job.data import plugins, selection
from job.data.folders import scan
from job.data.images import readable_endings


def encoded(image, form, **options):
    """Return the bytes of an image in a format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


FORMATS = {
    "a.avif": ("AVIF", "PIL.AvifImagePlugin"),
    "a.HEIC": ("HEIF", "pillow_heif"),
    "a.jxl": ("JXL", "pillow_jxl"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_plugin_reads_its_format(tmp_path, name):
    form, module = FORMATS[name]
    pytest.importorskip(module, reason="pip install '.[images]'")
    (tmp_path / name).write_bytes(
        encoded(Image.new("RGB", (40, 36), (255, 0, 0)), form, quality=95)
    )
    images = scan(str(tmp_path), "train")
    pixels, _, bad = images.read(0)
    assert not bad and pixels.shape == (36, 40, 3)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 10


@pytest.mark.parametrize("name", ["a.HEIC", "b.hif", "c.jxl"])
def test_plugin_missing_names_the_package(tmp_path, monkeypatch, name):
    missing = {ending for _, endings in plugins.PLUGINS.values() for ending in endings}
    monkeypatch.setattr(selection, "readable_endings", lambda: readable_endings() - missing)
    (tmp_path / name).touch()
    assert plugins.ADVICE in refused(scan, str(tmp_path), "train")
    (tmp_path / "d.png").touch()
    line = scan(str(tmp_path), "train").left_out
    assert line.startswith("left out 1 of 2 files") and line.endswith(f"; {plugins.ADVICE}")
    (tmp_path / name).rename(tmp_path / "e.txt")
    assert plugins.ADVICE not in scan(str(tmp_path), "train").left_out


def test_plugin_damaged_image_is_undecodable(tmp_path):
    for name, (form, module) in FORMATS.items():
        pytest.importorskip(module, reason="pip install '.[images]'")
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (40, 36)), form)[:-20])
    images = scan(str(tmp_path), "train", max_bad=3)
    _, _, bad = images.read(0)
    assert len(bad) == 3
