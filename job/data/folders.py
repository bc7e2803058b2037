"""Find the images that a command line names, and distribute them to the workers."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from job.data import imagenet, shards
from job.data.image_files import ImageFolder
from job.data.images import Images, Names
from job.data.joined import JoinedImages
from job.data.lists import read_list
from job.data.selection import Selection
from job.data.walk import class_names, dangling, images_below
from job.errors import RunError
from job.position import START, Position
from job.text import printable

TRAIN, VALIDATION = "train", ("val", "valid")
OTHER_SPLITS = ("test", "val", "valid", "validation")  # names of folders, in any case


def scan(data: str | Sequence[str], *splits: str, max_bad: int = 0) -> Images:
    """Return the images of the first of `splits` that `data` has, as files or packed.

    data: a folder or a list's file, or several, whose images follow one another. The split train
    may be missing: then all images below the folder count, except val and valid.
    RunError: the folder is missing, has no images, or is named twice.
    """
    sources = [data] if isinstance(data, str) else data
    seen: dict[str, str] = {}
    for source in sources:
        if same := seen.get(os.path.realpath(source)):
            problem = "the same images; expected different ones. Name one"
            raise RunError(f"{same} and {source}: {problem}")
        seen[os.path.realpath(source)] = source
    sets = [scan_one(source, splits, max_bad) for source in sources]
    if len(sets) == 1:
        return sets[0]
    return JoinedImages(sets, max_bad)


def scan_one(data: str, splits: Sequence[str], max_bad: int) -> Images:
    """Return the images of the first of `splits` that a folder or list has.

    RunError: it has no images, or no such split.
    """
    if os.path.isfile(data):
        if TRAIN not in splits:
            expected = f"a folder with {splits[0]}/<class>/*"
            raise RunError(f"{data} is a list, which has no validation images; expected {expected}")
        return read_list(data, max_bad)
    if not os.path.isdir(data):
        expected = f"a folder with {splits[0]}/<class>/* images"
        if TRAIN in splits:
            expected = "a folder of images, a text file with a path a line, or digits"
        raise RunError(f"{data}: no such folder or file; expected {expected}")
    if root := split_of(data, splits):
        return scan_split(data, root, max_bad)
    if TRAIN not in splits:
        named = " or ".join(splits)
        expected = f"{data}/{splits[0]}/<class>/* images"
        raise RunError(f"{data} has no folder {named}; expected {expected}")
    if is_packed(data):
        return shards.PackedImages(data, max_bad)
    return scan_below(data, data, max_bad, skipped=VALIDATION)


def split_of(data: str, splits: Sequence[str]) -> str:
    """Return the first folder of `splits` in `data`, or "" without one.

    RunError: a link of that name is broken. Without it, the run would use other images.
    """
    for split in splits:
        root = os.path.join(data, split)
        if os.path.islink(root) and not os.path.exists(root):
            raise dangling(root)
        if os.path.isdir(root):
            return root
    return ""


def is_packed(root: str) -> bool:
    """Whether a folder has an index of its shards."""
    return os.path.exists(os.path.join(root, shards.INDEX))


def scan_split(data: str, root: str, max_bad: int) -> Images:
    """Return the images of the folder `root`, a split of `data`.

    Without class folders that have images, they are the images in `root` itself.
    """
    if is_packed(root):
        return shards.PackedImages(root, max_bad)
    selection = Selection()
    classes = class_names(root, selection)
    blocks, counts = [], []
    for name in classes:
        before = selection.taken
        blocks += [Names.of(paths) for paths in images_below(root, name, selection) if paths]
        counts.append(selection.taken - before)
    if not blocks:
        return labelled_imagenet(scan_below(data, root, max_bad))
    labels = np.repeat(np.arange(len(classes)), counts)
    images = ImageFolder(root, classes, Names.joined(blocks), labels, max_bad)
    images.left_out = selection.report(root)
    if text := same_folders(root, classes):
        images.hints = {"same_folder": text}
    return images


def same_folders(root: str, classes: list[str]) -> str:
    """Return a line about classes that are one folder by a link, or "" without such."""
    found: dict[str, list[str]] = {}
    for name in classes:
        found.setdefault(os.path.realpath(os.path.join(root, name)), []).append(name)
    same = [names for names in found.values() if len(names) > 1]
    if not same:
        return ""
    shown = " and ".join(printable(os.path.join(root, name)) for name in same[0][:2])
    more = sum(map(len, same)) - 2
    others = f" ({more} more classes are the same folder as another)" if more else ""
    return f"{shown} lead to one folder, whose images are in both classes{others}. Remove the link"


def labelled_imagenet(images: ImageFolder) -> ImageFolder:
    """Return ImageNet's validation images with labels from their table, others unchanged."""
    if images.labelled:
        return images
    found = imagenet.validation_classes(images.root, images.names.all())
    images.classes = sorted({name for name in found if name})
    number = {name: label for label, name in enumerate(images.classes)}
    if found:
        images.labels = np.array([number.get(name, -1) for name in found], dtype=np.int64)
    return images


def scan_below(
    data: str,
    root: str,
    max_bad: int,
    skipped: Sequence[str] = (),
) -> ImageFolder:
    """Return all images below `root`. Their labels are the names of the folders in `root`.

    skipped: folders in `root` whose images are kept for validation. RunError: `root` has no images.
    """
    selection = Selection()
    classes: list[str] = []
    blocks, labels, counts = [], [], []
    kept = [name for name in skipped if os.path.isdir(os.path.join(root, name))]
    for paths in images_below(root, "", selection, frozenset(kept)):
        if not paths:
            continue
        folder, below, _ = paths[0].partition("/")
        if below and folder not in classes[-1:]:
            classes.append(folder)
        blocks.append(Names.of(paths))
        labels.append(len(classes) - 1 if below else -1)
        counts.append(len(paths))
    if not blocks:
        raise RunError(f"no images below {root}: {advice(data, root, selection, kept)}")
    images = ImageFolder(root, classes, Names.joined(blocks), np.repeat(labels, counts), max_bad)
    images.left_out = selection.report(root)
    images.held_out = [os.path.join(root, name) for name in kept]
    others = [name for name in classes if name.lower() in OTHER_SPLITS]
    if others and data == root:
        shown = ", ".join(os.path.join(root, name) for name in others)
        fix = f"To hold them out, move the others into {os.path.join(root, TRAIN)}"
        images.hints = {"other_split": f"the run trains on the images in {shown}, too. {fix}"}
    return images


def advice(data: str, root: str, selection: Selection, kept: list[str]) -> str:
    """Return the fix for a folder without images."""
    if kept:
        return f"to train on {root}/{kept[0]}, name that folder"
    if ".tar" in {os.path.splitext(file)[1].lower() for file in os.listdir(root)}:
        return f"its tar files have no index: python -m job.pack --index {data}"
    expected = "expected images, such as train/<class>/*"
    return "; ".join(filter(None, [expected, selection.report(root)]))


def scan_validation(data: str | Sequence[str], train: Images) -> Images:
    """Return the validation images of `data`: of several folders, of each that has some.

    RunError: they are missing, they or `train` have no labels, or the classes differ.
    """
    check_labelled(train)
    sources = [data] if isinstance(data, str) else data
    sources = [source for source in sources if split_of(source, VALIDATION)] or sources[:1]
    val = scan(sources, *VALIDATION, max_bad=train.max_bad)
    check_labelled(val)
    if train.classes != val.classes:
        differ = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:3])
        raise RunError(
            f"{train.root} and {val.root} must have the same classes; in one of them only: {differ}"
        )
    return val


def check_labelled(images: Images) -> None:
    """RunError: no image has a label."""
    if not images.labelled:
        raise RunError(
            f"no image in {images.root} has a label; expected labels for k-NN and job.linear. Sort"
            " the images into train/<class>/ (job.train without --knn-every needs no labels)"
            f"{imagenet.advice(images.root, images.names.all())}"
        )


class TrainingOrder:
    """Iterate over the batches of one worker, from a position to the end of the run.

    Every epoch has its own order of the images. The total batch of step s starts at index
    s * total, and worker r of N uses the r-th of its N equal slices. An epoch skips the last
    images, which do not fill a batch. Each item is (epoch, image index): with the seed, they
    determine a view.
    """

    def __init__(
        self,
        images: Images,
        total: int,
        rank: int,
        size: int,
        seed: int,
        epochs: int,
        start: Position = START,
    ):
        self.images, self.total, self.rank, self.size, self.seed = images, total, rank, size, seed
        self.epochs, self.start = epochs, start
        self.steps = len(images) // total  # of an epoch

    def __len__(self) -> int:
        first_epoch, first_step = self.start
        return max(0, (self.epochs - first_epoch) * self.steps - first_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = self.total // self.size  # of each worker
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            order = self.images.order(self.seed, epoch, self.total)
            for step in range(first_step if epoch == first_epoch else 0, self.steps):
                first = step * self.total + self.rank * batch
                yield [(epoch, int(index)) for index in order[first : first + batch]]


def every_nth_batch(images: Sequence[int], batch: int, rank: int, size: int) -> list[Sequence[int]]:
    """Return the batches of worker `rank` of `size`. Their content does not depend on `size`."""
    return [images[first : first + batch] for first in range(0, len(images), batch)][rank::size]
