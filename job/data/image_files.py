"""Images that are files: of a folder, or of a list."""

import os

import numpy as np

from job.cluster.travels import travels
from job.data.images import Images, Names
from job.data.randomness import permutation
from job.files import open_regular

LARGEST_FILE = 2**30  # bytes, above the 0.7 GB of the largest image that PIL reads


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
        """Return the bytes of an image's file. IrregularFile: it is special, or too large."""
        with open_regular(self.path(index), LARGEST_FILE) as file:
            return file.read()

    def order(self, seed: int, epoch: int, total: int) -> np.ndarray:
        """A permutation of all images, int64."""
        return permutation(len(self), seed, "order", epoch=epoch)


@travels
class ImageList(ImageFolder):
    """The images that the file `root` lists, in its order, without labels.

    base: the folder that relative paths begin at.
    """

    def __init__(self, root: str, paths: list[str] | Names, max_bad: int):
        super().__init__(root, [], paths, np.full(len(paths), -1), max_bad)
        self.base = os.path.dirname(root)

    @property
    def common_root(self) -> str:
        """The folder that relative paths begin at, with a slash behind it."""
        return os.path.join(self.base, "")

    def path(self, index: int) -> str:
        """Return an image's path."""
        return os.path.join(self.base, self.names[index])
