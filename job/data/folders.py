"""Image folders: what is in them, how a file is read, and which images a worker takes."""

import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from job.data.seeds import permutation
from job.errors import RunError

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, UnidentifiedImageError, Image.DecompressionBombError)


class ImageFolder:
    """The images of `root`/<class>/**, in an order that every machine agrees on.

    Paths lie in one block of bytes, not in a list: loader processes get copies, and a million Python
    strings in each would be most of their memory.

    max_bad: how many undecodable files are passed over in search of a good one.
    """

    def __init__(self, root: str, classes: list[str], paths: list[str], labels: list[int], max_bad: int):
        self.root, self.classes, self.max_bad = root, classes, max_bad
        encoded = [os.fsencode(path) for path in paths]
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The path of an image."""
        start = self.ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self.blob[start : self.ends[index]].tobytes()))

    def read(self, index: int) -> tuple[Image.Image, int, list[str]]:
        """Return an image, its label, and the files that could not be decoded on the way to it.

        A file that cannot be decoded is replaced by the next one that can. Where more than `max_bad` in a row
        cannot, or none can, the image is a black one, and the list is long enough to end the run.
        """
        bad = []
        for offset in range(min(len(self), self.max_bad + 1)):
            place = (index + offset) % len(self)
            try:
                return read_image(self.path(place)), int(self.labels[place]), bad
            except UNREADABLE as error:
                bad.append(f"{self.path(place)}: {error}")
        return Image.new("RGB", (32, 32)), int(self.labels[index]), bad


def scan(data: str, *splits: str, max_bad: int = 0) -> ImageFolder:
    """Return the images of the first of `splits` that `data` has. RunError: no such folder, or no images in it."""
    if not os.path.isdir(data):
        raise RunError(f"no folder {data}: expected one with {splits[0]}/<class>/* images")
    root = next((os.path.join(data, split) for split in splits if os.path.isdir(os.path.join(data, split))), None)
    if root is None:
        raise RunError(f"{data} has no folder {' or '.join(splits)}: expected {data}/{splits[0]}/<class>/* images")
    endings = readable_endings()
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(classes):
        for folder, below, files in os.walk(os.path.join(root, name)):
            below.sort()
            found = [os.path.join(folder, file) for file in sorted(files) if os.path.splitext(file)[1].lower() in endings]
            paths += [os.path.relpath(path, root) for path in found]
            labels += [label] * len(found)
    if not paths:
        loose = any(os.path.splitext(file)[1].lower() in endings for file in os.listdir(root))
        advice = "its images lie in no class folder: move them into one, such as all/" if loose else "expected <class>/* images"
        raise RunError(f"no images in the class folders of {root}: {advice}")
    return ImageFolder(root, classes, paths, labels, max_bad)


def scan_validation(data: str, train: ImageFolder) -> ImageFolder:
    """Return the validation images of `data`. RunError: there are none, or their classes are not those of `train`."""
    val = scan(data, "val", "valid", max_bad=train.max_bad)
    if train.classes != val.classes:
        differ = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:3])
        raise RunError(f"{train.root} and {val.root} must have the same classes; in one of them alone: {differ}")
    return val


def readable_endings() -> set[str]:
    """The file endings of the formats that PIL can read."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def read_image(path: str) -> Image.Image:
    """Return an image of any mode as RGB: what is transparent shows white, 16-bit grey keeps its upper 8 bits."""
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")


class TrainingOrder:
    """The images of one worker, batch by batch, from a step of an epoch to the end of the run.

    Every epoch has its own permutation of all images; step s takes its total batch from place s * total on,
    and worker r of N the r-th N-th of that. The last images, too few for a total batch, wait for another
    epoch. Each item is (epoch, image index): all that a view depends on besides the seed.
    """

    def __init__(self, images: int, total: int, rank: int, size: int, seed: int, epochs: int, start: tuple[int, int] = (0, 0)):
        self.images, self.total, self.rank, self.size, self.seed = images, total, rank, size, seed
        self.epochs, self.start = epochs, start
        self.steps = images // total  # of an epoch

    def __len__(self) -> int:
        return max(0, (self.epochs - self.start[0]) * self.steps - self.start[1])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.total // self.size
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            order = permutation(self.images, self.seed, "order", epoch=epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.steps):
                first = step * self.total + self.rank * share
                yield [(epoch, int(index)) for index in order[first : first + share]]


def every_nth_batch(images: list[int], batch: int, rank: int, size: int) -> list[list[int]]:
    """Return the batches of `images` that worker `rank` of `size` takes; what is in a batch does not depend on `size`."""
    return [images[first : first + batch] for first in range(0, len(images), batch)][rank::size]
