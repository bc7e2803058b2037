"""Several folders, shards or lists as one set of images."""

import numpy as np

from job.cluster.travels import travels
from job.data.images import Images, Names
from job.data.randomness import permutation
from job.data.shards import PackedImages, lanes


@travels
class JoinedImages(Images):
    """The images of several sets, one after the other. Classes of one name are one class."""

    def __init__(self, parts: list[Images], max_bad: int):
        first, *others = parts
        more = f"{len(others)} more" if len(others) > 1 else others[0].root
        classes = sorted({name for part in parts for name in part.classes})
        number = {name: label for label, name in enumerate(classes)}
        labels = []
        for part in parts:
            own = np.array([*(number[name] for name in part.classes), -1])  # -1: no label
            labels.append(own[part.labels])
        names, root = Names.joined([part.names for part in parts]), f"{first.root} and {more}"
        super().__init__(root, classes, names, np.concatenate(labels), max_bad)
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        self.left_out = "; ".join(part.left_out for part in parts if part.left_out)
        self.held_out = [folder for part in parts for folder in part.held_out]
        hints = [hint for part in parts for hint in part.hints.items()]
        self.hints = {id: "; ".join(text for of, text in hints if of == id) for id, _ in hints}

    @property
    def common_root(self) -> str:
        """No root: each set has its own."""
        return ""

    def locate(self, index: int) -> tuple[Images, int]:
        """Return the set that has an image, and its number there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        part = self.parts[number]
        return part, index - int(self.ends[number]) + len(part)

    def path(self, index: int) -> str:
        """Return the path of an image, for people."""
        part, number = self.locate(index)
        return part.path(number)

    def content(self, index: int) -> bytes:
        """Return the bytes of an image's file."""
        part, number = self.locate(index)
        return part.content(number)

    def order(self, seed: int, epoch: int, total: int) -> np.ndarray:
        """Return the images of an epoch: in lanes if all are shards, else a permutation."""
        packed = [part for part in self.parts if isinstance(part, PackedImages)]
        if len(packed) < len(self.parts):
            return permutation(len(self), seed, "order", epoch=epoch)
        starts = [int(end) - len(part) for part, end in zip(packed, self.ends, strict=True)]
        ends = [part.shard_ends + start for part, start in zip(packed, starts, strict=True)]
        return lanes(np.concatenate(ends), seed, epoch, total)
