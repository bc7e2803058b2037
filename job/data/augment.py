"""MoCo's augmentations of one image, the centre crop, and the network's normalised input.

Images are uint8 arrays (H, W, 3). Views are uint8 tensors (3, size, size), channels last in memory.
They stay uint8 up to the device, which needs a quarter of the memory of floats.

A random view is a crop and its appearance: a row of numbers for the colour operations, their
order, the blur and the flip. job/data/render.py applies it to one image on the CPU,
job/data/render_batch.py to a batch on a device.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from job.data.images import DIVISORS
from job.data.render import render

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]

# The fields of an appearance, (12,) float32: five operations in their order (indices of
# render.OPERATIONS, or NONE), the amount of each, the blur's standard deviation in pixels
# (0: none), and whether it is flipped.
OPERATIONS, FACTORS, SIGMA, FLIP = slice(0, 5), slice(5, 10), 10, 11
SATURATION, NONE = 2, -1  # with a factor of 0, saturation makes grey

# A JPEG is decoded at a half, a quarter or an eighth of its sides if each of its crops then still
# has this many times the sides of its view. The first reduction smooths, so the second uses a
# sharper filter. The views are then as close to exact averages as those of the full image.
REDUCED_SIDES, REDUCED_FILTER = 2, "bicubic"


class Crop(NamedTuple):
    """A rectangle of an image, and the image's sides, all in pixels."""

    top: int
    left: int
    height: int
    width: int
    of_height: int
    of_width: int


class RandomView:
    """Make a random view of an image (H, W, 3) uint8, by MoCo v2 if `aug_plus`, else by v1.

    crop_min: smallest fraction of the image's area in a crop. weak: crops and flips only.
    `crop` and `appearance` are its two steps, so that a device can apply the second. `draw` draws
    the random numbers of both, before the image is decoded.
    Source: arXiv 2003.04297, section 2. The blur is SimCLR's, arXiv 2002.05709.
    """

    def __init__(self, size: int, aug_plus: bool, crop_min: float = 0.2, weak: bool = False):
        self.size, self.aug_plus, self.crop_min, self.weak = size, aug_plus, crop_min, weak

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return a view, (3, size, size) uint8."""
        crop = self.crop(image, random)
        return drawn_view(crop, self.appearance(random))

    def draw(self, height: int, width: int, random: np.random.Generator) -> tuple[Crop, np.ndarray]:
        """Return a crop of an image of these sides, and an appearance (12,) float32."""
        crop = draw_crop(height, width, (self.crop_min, 1.0), random)
        return crop, self.appearance(random)

    def crop(self, image: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return a random crop of the image, (3, size, size) uint8."""
        return random_crop(image, self.size, (self.crop_min, 1.0), random)

    def appearance(self, random: np.random.Generator) -> np.ndarray:
        """Return a random appearance, (12,) float32. The number of draws is always the same."""
        order, amounts = np.argsort(random.random(4)), 2 * random.random(4) - 1
        jittered, grey, blurred, sigma, flipped = random.random(5)
        # Brightness, contrast and saturation: 0.6 to 1.4. Hue: a fraction of the circle.
        factors = (
            np.array([1.0, 1.0, 1.0, 0.0])
            + np.array([0.4, 0.4, 0.4, 0.1 if self.aug_plus else 0.4]) * amounts
        )
        if self.aug_plus and jittered >= 0.8:
            order = np.full(4, NONE)
        grey = SATURATION if grey < 0.2 else NONE
        row = np.zeros(12, dtype=np.float32)
        row[OPERATIONS] = [*order, grey] if self.aug_plus else [grey, *order]
        row[FACTORS] = [*factors[order], 0.0] if self.aug_plus else [0.0, *factors[order]]
        row[SIGMA] = 0.1 + 1.9 * sigma if self.aug_plus and blurred < 0.5 else 0.0
        if self.weak:
            row[OPERATIONS], row[SIGMA] = NONE, 0.0
        row[FLIP] = flipped < 0.5
        return row


class ClassifierView:
    """Make a classifier's training view of an image (H, W, 3) uint8: a random crop and flip."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return a view, (3, size, size) uint8."""
        view = random_crop(image, self.size, (0.08, 1.0), random)
        return view.flip(2) if random.random() < 0.5 else view


def drawn_view(crop: torch.Tensor, appearance: np.ndarray) -> torch.Tensor:
    """Return a crop (3, H, W) uint8 with an appearance (12,), (3, H, W) uint8."""
    return pixels(render(crop.permute(1, 2, 0).numpy(), appearance))


def random_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], random: np.random.Generator
) -> torch.Tensor:
    """Return a crop of random position and shape, resized to (3, size, size) uint8."""
    H, W = image.shape[:2]
    return cut(image, draw_crop(H, W, scale, random), size)


def draw_crop(H: int, W: int, scale: tuple[float, float], random: np.random.Generator) -> Crop:
    """Return a crop of random position and shape of an image (H, W).

    Its fraction of the area is drawn from `scale`, its width over its height from 3/4 to 4/3.
    If ten draws do not fit into the image, it is the largest centre crop of such proportions
    (torchvision's rule).
    """
    for _ in range(10):
        area = H * W * (scale[0] + (scale[1] - scale[0]) * random.random())
        ratio = math.exp(math.log(4 / 3) * (2 * random.random() - 1))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= W and 0 < height <= H:
            top = int(random.random() * (H - height + 1))
            left = int(random.random() * (W - width + 1))
            break
    else:
        height, width = min(H, max(1, round(W / (3 / 4)))), min(W, max(1, round(H * (4 / 3))))
        top, left = (H - height) // 2, (W - width) // 2
    return Crop(top, left, height, width, H, W)


def cut(image: np.ndarray, crop: Crop, size: int) -> torch.Tensor:
    """Return a crop of an image, resized to (3, size, size) uint8.

    If the image is a reduced copy, the crop's edges are rounded to its pixels.
    """
    H, W = image.shape[:2]
    if (H, W) == (crop.of_height, crop.of_width):
        image = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        return resize(image, size, size)
    rows = fitted(crop.top, crop.height, H / crop.of_height)
    columns = fitted(crop.left, crop.width, W / crop.of_width)
    return resize(image[rows, columns], size, size, REDUCED_FILTER)


def fitted(start: int, length: int, scale: float) -> slice:
    """Return an interval of an image's pixels as pixels of a copy with `scale` times its side."""
    return slice(round(start * scale), round((start + length) * scale))


def divisor(crops: Iterable[Crop], size: int) -> int:
    """Return the largest of DIVISORS that leaves each crop REDUCED_SIDES times its view's sides."""
    shortest = min(min(crop.height, crop.width) for crop in crops)
    return max(each for each in DIVISORS if each == 1 or shortest >= each * REDUCED_SIDES * size)


class CentreView:
    """Make an image's centre crop, with ImageNet's usual border: 224 of 256 pixels."""

    def __init__(self, size: int):
        self.size = size

    def __call__(
        self, image: np.ndarray, random: np.random.Generator | None = None
    ) -> torch.Tensor:
        """Return a view, (3, size, size) uint8."""
        # The ends of a long strip are not in the crop, and would need gigabytes.
        reach = 4 * min(image.shape[:2])
        top, left = (max(0, (side - reach) // 2) for side in image.shape[:2])
        image = image[top : top + reach, left : left + reach]
        H, W = image.shape[:2]
        short = round(self.size * 256 / 224)
        height, width = (
            short if side == min(H, W) else int(short * side / min(H, W)) for side in (H, W)
        )
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return resize(image, height, width)[:, top : top + self.size, left : left + self.size]


View = Callable[[np.ndarray, np.random.Generator], torch.Tensor]


def resize(image: np.ndarray, height: int, width: int, mode: str = "bilinear") -> torch.Tensor:
    """Return an image (H, W, 3) uint8, resized to (3, height, width).

    Antialiased, and equal to PIL's result in this mode except for rounding.
    """
    # torch detects channels last from these strides.
    batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode=mode, antialias=True)[0]


def pixels(image: np.ndarray) -> torch.Tensor:
    """Return an image (H, W, 3) as a tensor (3, H, W) over the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


@functools.lru_cache(maxsize=8)
def row_constants(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of a row of pixels, (3 x width,) each."""
    mean, std = (255 * torch.tensor(values, device=device).repeat(width) for values in (MEAN, STD))
    return mean, std


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 images (B, 3, H, W) to floats, channels last. Floats stay unchanged."""
    if images.dtype != torch.uint8:
        return images
    B, _, H, W = images.shape
    # A row of pixels at a time: three numbers at a time are six times as slow.
    mean, std = row_constants(W, images.device)
    rows = images.permute(0, 2, 3, 1).reshape(B * H, 3 * W).float()
    return rows.sub_(mean).div_(std).view(B, H, W, 3).permute(0, 3, 1, 2)
