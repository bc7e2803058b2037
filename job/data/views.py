"""From images to batches: random views for training, one centre crop for measuring."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from job.data.augment import CentreView, Crop, RandomView, View, cut, divisor, drawn_view
from job.data.images import Images
from job.data.randomness import counter


class RandomViews(Dataset):
    """(epoch, index) -> `number` views, undecodable files.

    The views are functions of seed, epoch and index. The first views are the same for any number.
    If `rendered` is false, a view is a pair of a crop and its appearance, which the device renders.
    """

    def __init__(
        self,
        images: Images,
        view: RandomView,
        number: int,
        seed: int,
        rendered: bool = True,
    ):
        self.images, self.view, self.number = images, view, number
        self.seed, self.rendered = seed, rendered

    def __getitem__(self, draw: tuple[int, int]) -> tuple:
        epoch, index = draw
        drawn: list[tuple[Crop, np.ndarray]] = []

        def reduction(height: int, width: int) -> int:
            random = np.random.Generator(counter(self.seed, "view", epoch=epoch, sample=index))
            drawn[:] = [self.view.draw(height, width, random) for _ in range(self.number)]
            return divisor((crop for crop, _ in drawn), self.view.size)

        image, _, bad = self.images.read(index, reduction)
        return *(self.make(image, crop, appearance) for crop, appearance in drawn), bad

    def make(self, image: np.ndarray, crop: Crop, appearance: np.ndarray) -> Any:
        """Return a view (3, H, W) uint8, or a crop (3, H, W) and its appearance (12,) float32."""
        cropped = cut(image, crop, self.view.size)
        if self.rendered:
            return drawn_view(cropped, appearance)
        return cropped, torch.from_numpy(appearance)


class NumberedViews(RandomViews):
    """(epoch, index) -> views as in RandomViews, index of the image in them, undecodable files."""

    def __getitem__(self, draw: tuple[int, int]) -> tuple:
        *views, bad = super().__getitem__(draw)
        return *views, image_read(self.images), bad


class OneView(Dataset):
    """(epoch, index) -> view (3, H, W) uint8, label, undecodable files.

    The view is a function of seed, epoch and index.
    """

    def __init__(self, images: Images, view: View, seed: int):
        self.images, self.view, self.seed = images, view, seed

    def __getitem__(self, draw: tuple[int, int]) -> tuple[torch.Tensor, int, list[str]]:
        epoch, index = draw
        image, label, bad = self.images.read(index)
        random = np.random.Generator(counter(self.seed, "view", epoch=epoch, sample=index))
        return self.view(image, random), label, bad


class CentreViews(Dataset):
    """index -> centre crop (3, H, W) uint8, label, undecodable files.

    The label is -1 if another image replaces an undecodable one.
    """

    def __init__(self, images: Images, size: int):
        self.images = images
        self.view = CentreView(size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[str]]:
        image, label, bad = self.images.read(index)
        return self.view(image), -1 if bad else label, bad


class NumberedCrops(CentreViews):
    """index -> centre crop (3, H, W) uint8, index of the image in it, undecodable files."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[str]]:
        view, _, bad = super().__getitem__(index)
        return view, image_read(self.images), bad


def image_read(images: Images) -> int:
    """Return the index of the image read last, -1 after a black one.

    It differs from the index drawn if another image replaces an undecodable one.
    """
    return int(images.reading[0])


def collate(items: list[tuple]) -> tuple:
    """Stack the items' values, and join their lists of undecodable files, the last value."""
    *values, bad = zip(*items, strict=True)
    return *map(stack, values), [file for files in bad for file in files]


def stack(parts: tuple) -> Any:
    """Stack values: pairs to a pair of stacks, numbers to (B,), vectors (D,) to (B, D).

    Views (3, H, W) become (B, 3, H, W), channels last.
    """
    if isinstance(parts[0], tuple):
        return tuple(stack(part) for part in zip(*parts, strict=True))
    if not torch.is_tensor(parts[0]):
        return torch.tensor(parts)
    if parts[0].dim() == 3:
        return torch.stack([view.permute(1, 2, 0) for view in parts]).permute(0, 3, 1, 2)
    return torch.stack(parts)
