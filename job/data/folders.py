"""Image folders: what is in them, how a file is read, and which images a worker takes."""

import os
from collections.abc import Iterator

import numpy as np

from job.cluster.travels import travels
from job.data import shards
from job.data.images import Images, Names
from job.data.randomness import permutation
from job.data.selection import Selection
from job.data.walk import class_names, images_below
from job.errors import RunError
from job.files import open_regular
from job.position import START, Position

LARGEST_FILE = 2**30  # bytes; the largest image that PIL reads has 0.7 GB without any compression


@travels
class ImageFolder(Images):
    """The images of `root`/<class>/**, each a file, in an order that every machine agrees on."""

    def __init__(
        self,
        root: str,
        classes: list[str],
        paths: list[str] | Names,
        labels: list[int] | np.ndarray,
        max_bad: int,
    ):
        names = paths if isinstance(paths, Names) else Names.of(paths)
        super().__init__(root, classes, names, np.asarray(labels, dtype=np.int64), max_bad)

    def path(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, self.names[index])

    def content(self, index: int) -> bytes:
        """The bytes of an image's file. IrregularFile: what has its name is none, or too large for one."""
        with open_regular(self.path(index), LARGEST_FILE) as file:
            return file.read()

    def order(self, seed: int, epoch: int, total: int) -> np.ndarray:
        """A permutation of all images, int64."""
        return permutation(len(self), seed, "order", epoch=epoch)


def scan(data: str, *splits: str, max_bad: int = 0) -> Images:
    """Return the images of the first of `splits` that `data` has, as files or packed.

    RunError: no such folder, or no images in it.
    """
    if not os.path.isdir(data):
        raise RunError(f"no folder {data}: expected one with {splits[0]}/<class>/* images")
    root = next((os.path.join(data, split) for split in splits if os.path.isdir(os.path.join(data, split))), None)
    if root is None:
        raise RunError(f"{data} has no folder {' or '.join(splits)}: expected {data}/{splits[0]}/<class>/* images")
    if os.path.exists(os.path.join(root, shards.INDEX)):
        return shards.PackedImages(root, max_bad)
    selection = Selection()
    classes = class_names(root, selection)
    blocks, counts = [], []
    for name in classes:
        before = selection.taken
        blocks += [Names.of(paths) for paths in images_below(root, name, selection) if paths]
        counts.append(selection.taken - before)
    if not blocks:
        raise RunError(f"no images in the class folders of {root}: {advice(data, root, selection)}")
    labels = np.repeat(np.arange(len(classes)), counts)
    images = ImageFolder(root, classes, Names.joined(blocks), labels, max_bad)
    images.left_out = selection.report(root)
    return images


def advice(data: str, root: str, selection: Selection) -> str:
    """Return what to do about a folder without images."""
    kinds = {os.path.splitext(file)[1].lower() for file in os.listdir(root)}
    if kinds & selection.endings:
        return "its images lie in no class folder: move them into one, such as all/"
    if ".tar" in kinds:
        return f"its tar files have no index: python -m job.pack --index {data}"
    return "; ".join(filter(None, ["expected <class>/* images", selection.report(root)]))


def scan_validation(data: str, train: Images) -> Images:
    """Return the validation images of `data`.

    RunError: they are missing, they or those of `train` have no labels, or their classes differ.
    """
    val = scan(data, "val", "valid", max_bad=train.max_bad)
    for images in (train, val):
        if not images.labelled:
            raise RunError(
                f"no image in {images.root} has a label: k-NN and job.linear need labels; "
                "job.train without --knn-every needs none"
            )
    if train.classes != val.classes:
        differ = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:3])
        raise RunError(f"{train.root} and {val.root} must have the same classes; in one of them alone: {differ}")
    return val


class TrainingOrder:
    """The images of one worker, batch by batch, from a step of an epoch to the end of the run.

    Every epoch has its own order of the images; step s takes its total batch from place s * total on, and worker
    r of N the r-th N-th of that. The last images, too few for a total batch, wait for another epoch. Each item is
    (epoch, image index): all that a view depends on besides the seed.
    """

    def __init__(self, images: Images, total: int, rank: int, size: int, seed: int, epochs: int, start: Position = START):
        self.images, self.total, self.rank, self.size, self.seed = images, total, rank, size, seed
        self.epochs, self.start = epochs, start
        self.steps = len(images) // total  # of an epoch

    def __len__(self) -> int:
        first_epoch, first_step = self.start
        return max(0, (self.epochs - first_epoch) * self.steps - first_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.total // self.size
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            order = self.images.order(self.seed, epoch, self.total)
            for step in range(first_step if epoch == first_epoch else 0, self.steps):
                first = step * self.total + self.rank * share
                yield [(epoch, int(index)) for index in order[first : first + share]]


def every_nth_batch(images: list[int], batch: int, rank: int, size: int) -> list[list[int]]:
    """Return the batches of `images` that worker `rank` of `size` takes; what is in a batch does not depend on `size`."""
    return [images[first : first + batch] for first in range(0, len(images), batch)][rank::size]
