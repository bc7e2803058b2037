"""Packed images: tar shards read in sequence, and the index of their images."""

import io
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from job.cluster.travels import travels
from job.data.images import Images, Names
from job.data.randomness import counter, permutation
from job.data.selection import Selection
from job.data.tars import Shard
from job.errors import RunError
from job.files import patient, whole_file

INDEX = "index.npz"  # in the folder of the shards
SPLITS = ("train", "val", "valid")
FORMAT = 1
PARTS = {
    "format", "classes", "shards", "shard_bytes", "shard_images",
    "names", "ends", "offsets", "sizes", "labels",
}  # fmt: skip
OPEN_SHARDS = 256  # of a process, well below the usual limit of 1024 open files


@travels
class PackedImages(Images):
    """The images of the shards in folder `root`. RunError: its index does not match its files."""

    def __init__(self, root: str, max_bad: int):
        index = load_index(root)
        names = Names(index["names"], index["ends"])
        super().__init__(root, text(index["classes"]), names, index["labels"], max_bad)
        self.shards = text(index["shards"])
        self.offsets, self.sizes = index["offsets"], index["sizes"]
        self.left_out = unindexed(root, self.shards)
        self.shard_ends = index["shard_images"].cumsum()  # end of each shard among all images
        # {shard: file}, the least recently used first.
        self.open_files: OrderedDict[int, io.FileIO] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open_files": OrderedDict()}  # a loader process opens its own

    def shard(self, index: int) -> int:
        """The number of the shard that has an image."""
        return int(np.searchsorted(self.shard_ends, index, side="right"))

    def path(self, index: int) -> str:
        """The path of an image: root/train-000012.tar:class/image.jpg."""
        return f"{os.path.join(self.root, self.shards[self.shard(index)])}:{self.names[index]}"

    def content(self, index: int) -> bytes:
        """The bytes of an image's file."""
        shard, size = self.shard(index), int(self.sizes[index])
        try:
            content = os.pread(self.file(shard).fileno(), size, int(self.offsets[index]))
            if len(content) < size:
                raise OSError(f"{self.shards[shard]} is incomplete")
        except OSError:
            # A stale handle stays stale, so the next attempt opens the file again.
            self.open_files.pop(shard, None)
            raise
        return content

    def file(self, shard: int) -> io.FileIO:
        """Return a shard's file. It stays open, because opening is slow on such file systems."""
        if shard not in self.open_files:
            if len(self.open_files) == OPEN_SHARDS:
                self.open_files.popitem(last=False)[1].close()
            self.open_files[shard] = open(
                os.path.join(self.root, self.shards[shard]), "rb", buffering=0
            )
        self.open_files.move_to_end(shard)
        return self.open_files[shard]

    def order(self, seed: int, epoch: int, total: int) -> np.ndarray:
        """Return the images of an epoch in lanes that read shards in sequence."""
        return lanes(self.shard_ends, seed, epoch, total)


def lanes(shard_ends: np.ndarray, seed: int, epoch: int, total: int) -> np.ndarray:
    """Return an order in which each of the `total` positions of a batch is a lane.

    A lane reads shards in sequence. Shards longer than an epoch's steps are cut into stretches of
    as many images. The stretches form a row in random order, and each lane gets one image of it
    for each step. A lane begins at a random one of its images, and wraps at their end. So two
    images of different lanes meet in a batch with probability 1 / steps, as in a permutation. Each
    epoch draws again which ones meet. Unlike in a permutation, neighbours in a shard mostly follow
    each other. So the order within a shard must be random, as `job.pack` makes it.
    shard_ends: the end of each shard among all images.
    """
    steps = int(shard_ends[-1]) // total
    longest = max(1, steps)
    starts = np.append(0, shard_ends[:-1])
    stretches = [
        np.arange(first, min(first + longest, end))
        for start, end in zip(starts, shard_ends, strict=True)
        for first in range(start, end, longest)
    ]
    chosen = permutation(len(stretches), seed, "order", epoch=epoch)
    row = np.concatenate([stretches[number] for number in chosen])
    cut = row[: total * steps].reshape(total, steps)
    random = counter(seed, "order", epoch=epoch, sample=1)  # sample 0 is the row's
    first_steps = random.random_raw(total) % np.uint64(longest)
    indices = (first_steps.astype(np.int64)[:, None] + np.arange(steps)) % longest  # (total, steps)
    return np.take_along_axis(cut, indices, axis=1).T.flatten()


def load_index(root: str) -> dict[str, np.ndarray]:
    """Return the index of the shards in folder `root`.

    RunError: it is unreadable or damaged, or a shard does not match it.
    """
    path = os.path.join(root, INDEX)
    fix = f"python -m job.pack --index {os.path.dirname(root)}"
    content = patient(Path(path).read_bytes, path)
    try:
        with np.load(io.BytesIO(content)) as file:
            index = {name: file[name] for name in file.files}
        version, names, sizes = int(index["format"]), text(index["shards"]), index["shard_bytes"]
    except Exception:  # zipfile and numpy raise many kinds on damaged bytes
        raise RunError(f"{path}: incomplete index. Write it again: {fix}") from None
    if version != FORMAT:
        raise RunError(
            f"{path} has format {version}, this version reads {FORMAT}. Write it again: {fix}"
        )
    if missing := PARTS - index.keys():
        raise RunError(
            f"{path}: incomplete index: {min(missing)} is missing. Write it again: {fix}"
        )
    for name, expected in zip(names, sizes, strict=True):
        shard = os.path.join(root, name)
        size = os.path.getsize(shard) if os.path.exists(shard) else None
        if size is None:
            raise RunError(
                f"{shard} is missing. Copy it again, or write the index of the others: {fix}"
            )
        if size != expected:
            raise RunError(
                f"{shard} has {size} bytes; expected {expected}, as in the index."
                f" Copy it again, or if it is complete: {fix}"
            )
    return index


def unindexed(root: str, shards: list[str]) -> str:
    """Return a line about the files of folder `root` missing in its index, or "" without such."""
    selection = Selection()
    selection.taken = len(shards)
    for name in sorted({*os.listdir(root)} - {INDEX, *SPLITS, *shards}):
        if selection.keeps(name, name):
            selection.left_out.add("missing in the index", name)
    return selection.report(root)


def save_index(root: str, classes: list[str], shards: list[Shard]) -> None:
    """Write the index of `shards` into their folder `root`."""
    names = Names.of([name for shard in shards for name in shard.names])

    def column(key: str) -> np.ndarray:
        return np.array(
            [value for shard in shards for value in getattr(shard, key)], dtype=np.int64
        )

    with whole_file(os.path.join(root, INDEX)) as file:
        np.savez(
            file,
            format=FORMAT,
            classes=block(classes),
            shards=block([shard.name for shard in shards]),
            shard_bytes=np.array([shard.size for shard in shards], dtype=np.int64),
            shard_images=np.array([len(shard.names) for shard in shards], dtype=np.int64),
            names=names.blob,
            ends=names.ends,
            offsets=column("offsets"),
            sizes=column("sizes"),
            labels=column("labels"),
        )


def block(names: list[str]) -> np.ndarray:
    """A few names as uint8, for `text`."""
    return np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)


def text(content: np.ndarray) -> list[str]:
    """The names of a `block`."""
    return os.fsdecode(content.tobytes()).split("\0") if content.size else []
