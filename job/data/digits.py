"""scikit-learn's digits as an image folder: real data for a first run, without a download."""

import os
import shutil
from collections.abc import Sequence

import numpy as np
from PIL import Image

from job.errors import RunError

FOLDER = "data/digits"
SIDE = 32  # pixels, of originals with 8


def prepared(data: str) -> str:
    """Return the folder of `data`. If it is `digits`, write them to FOLDER first."""
    if data != "digits":
        return data
    write_digits(FOLDER)
    return FOLDER


def all_prepared(data: Sequence[str]) -> list[str]:
    """Return the folders of several `data`."""
    return [prepared(one) for one in data]


def write_digits(folder: str) -> None:
    """Write 1,437 images to train/<digit>/ and 360 to val/<digit>/, unless the folder exists.

    RunError: the folder cannot be written.
    """
    if os.path.isdir(folder):
        return
    from sklearn.datasets import load_digits  # a second to import

    try:
        write(folder, *load_digits(return_X_y=True))
    except OSError as error:
        raise RunError(
            f"cannot write the digits to {folder}: {error.strerror}."
            " Run the command in a writable folder"
        ) from None


def write(folder: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images (n, 64) of values 0 to 16 as PNG files."""
    part = f"{folder}.part"  # renamed at the end, so that an existing folder is complete
    shutil.rmtree(part, ignore_errors=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        # Each writer's digits are consecutive: a split by position separates most writers.
        split = "train" if number < len(images) * 4 // 5 else "val"
        os.makedirs(os.path.join(part, split, str(label)), exist_ok=True)
        grey = Image.fromarray((image.reshape(8, 8) * 255 / 16).astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(
            os.path.join(part, split, str(label), f"{number:04d}.png")
        )
    os.rename(part, folder)
