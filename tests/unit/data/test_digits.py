"""The digits as an image folder."""

import os

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from job.data.digits import write_digits
from job.data.folders import scan
from job.errors import RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("digits") / "deep" / "digits")
    write_digits(path)
    return path


@pytest.mark.parametrize(("split", "number"), [("train", 1437), ("val", 360)])
def test_digits_are_an_image_folder(folder, split, number):
    images = scan(folder, split)
    assert len(images) == number
    assert images.classes == [str(digit) for digit in range(10)]
    assert set(images.labels.tolist()) == set(range(10))
    image, label, bad = images.read(number // 2)
    assert (image.shape, image.dtype, bad) == ((32, 32, 3), "uint8", [])


def test_digits_are_written_once_with_their_labels(folder):
    pixels, labels = load_digits(return_X_y=True)
    label_of = {}
    for split in ("train", "val"):
        images = scan(folder, split)
        for index in range(len(images)):
            number = int(os.path.splitext(os.path.basename(images.path(index)))[0])
            label_of[number] = int(images.labels[index])
    assert label_of == dict(enumerate(labels.tolist()))
    for number in (0, 700, 1436):
        with Image.open(f"{folder}/train/{labels[number]}/{number:04d}.png") as image:
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(
                float
            )
        assert np.corrcoef(small.flatten(), pixels[number])[0, 1] > 0.95


def test_digits_differ_in_train_and_val(folder):
    names = [
        {os.path.basename(images.path(i)) for i in range(len(images))}
        for images in (scan(folder, s) for s in ("train", "val"))
    ]
    assert not names[0] & names[1]


def test_digits_keep_an_existing_folder(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine").write_text("x")
    write_digits(str(tmp_path / "digits"))
    assert os.listdir(tmp_path / "digits") == ["mine"]


def test_digits_replace_an_incomplete_folder(tmp_path, monkeypatch):
    path = str(tmp_path / "digits")
    monkeypatch.setattr(
        "sklearn.datasets.load_digits", lambda return_X_y: (np.full((5, 64), 8.0), np.arange(5))
    )
    save, left = Image.Image.save, [3]

    def full(image, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        save(image, *args)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(KeyboardInterrupt):
        write_digits(path)
    assert not os.path.exists(path)
    left[0] = 100
    write_digits(path)
    assert sum(len(files) for _, _, files in os.walk(path)) == 5
    assert os.listdir(tmp_path) == ["digits"]


def refused(path):
    with pytest.raises(RunError) as caught:
        write_digits(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_refuse_an_unwritable_path(tmp_path):
    (tmp_path / "file").write_text("x")
    path = str(tmp_path / "file" / "digits")
    assert path in refused(path)
