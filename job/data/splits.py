"""All images of a folder, one split after the other, with their paths in the folder."""

import bisect
import hashlib
from dataclasses import dataclass

from job.data import digits
from job.data.folders import TRAIN, is_packed, scan, split_of
from job.data.images import Images
from job.data.selection import Selection
from job.data.shards import SPLITS
from job.data.walk import images_below
from job.text import printable


@dataclass(frozen=True)
class Split:
    """Images of a split. prefix: of their paths. first: number of the first among all images."""

    prefix: str
    images: Images
    first: int


class Splits:
    """The splits of a folder. images_of: the images of each, by prefix, in order."""

    def __init__(self, images_of: dict[str, Images]):
        self.parts: list[Split] = []
        for prefix, images in images_of.items():
            self.parts.append(Split(prefix, images, len(self)))

    def __len__(self) -> int:
        """Return the number of images."""
        return self.parts[-1].first + len(self.parts[-1].images) if self.parts else 0

    def path(self, number: int) -> str:
        """Return the path of an image from the folder on."""
        split = self.split_of(number)
        return split.prefix + split.images.names[number - split.first]

    def full_path(self, number: int) -> str:
        """Return the path of an image, for people."""
        split = self.split_of(number)
        return printable(split.images.path(number - split.first))

    def split_of(self, number: int) -> Split:
        """Return the split that has an image."""
        index = bisect.bisect_right([split.first for split in self.parts], number) - 1
        return self.parts[index]

    @property
    def digest(self) -> str:
        """SHA-256 (first 16 hex digits) of all paths in their order."""
        names = hashlib.sha256()
        for split in self.parts:
            names.update(split.prefix.encode() + split.images.names.blob.tobytes())
            names.update(split.images.names.ends.tobytes())
        return names.hexdigest()[:16]


def find_images(data: str) -> dict[str, Images]:
    """Return {prefix: images} of each split of a folder, or of a folder without splits.

    Without train/, the first images are those outside val/ and valid/, on which a run trains.
    RunError: the folder has no images.
    """
    data = digits.prepared(data)
    splits = [split for split in SPLITS if split_of(data, [split])]
    found = {f"{split}/": scan(data, split) for split in splits}
    if found and (TRAIN in splits or not has_images(data, splits)):
        return found
    return {"": scan(data, TRAIN)} | found


def has_images(data: str, splits: list[str]) -> bool:
    """Return whether a folder has images, as files or packed, outside `splits`."""
    return is_packed(data) or any(images_below(data, "", Selection(), frozenset(splits)))
