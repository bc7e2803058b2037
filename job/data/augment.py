"""The views: MoCo's augmentations of one image, the centre crop, and the network's input from their bytes.

Images come as uint8 arrays (H, W, 3), views are uint8 tensors (3, size, size), channels last in memory. They stay
uint8 until they are on the device, a quarter of what floats would take through the loader and the shuffle.

A random view is a crop and a row of numbers, its appearance: what happens to its colours, in which order, how much it
is blurred, whether it is flipped. job/data/render.py draws that on one image, job/data/render_batch.py on a batch on a device.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from job.data.render import render

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]

# Of an appearance, (12,) float32: five operations in their order (their places in render.OPERATIONS, or NONE), the
# factor of each, the blur's standard deviation in pixels (0: none), and whether it is flipped.
OPERATIONS, FACTORS, SIGMA, FLIP = slice(0, 5), slice(5, 10), 10, 11
SATURATION, NONE = 2, -1  # with a factor of 0, saturation makes grey


class RandomView:
    """An image (H, W, 3) uint8 and a generator -> a random view: MoCo v2's augmentation if `aug_plus`, else v1's.

    crop_min: the smallest share of the image's area that a view shows (arXiv 2003.04297, section 2; the blur is
    SimCLR's, arXiv 2002.05709). weak: crops and flips only. `crop` and `appearance` are its two halves, for a device to
    draw the second.
    """

    def __init__(self, size: int, aug_plus: bool, crop_min: float = 0.2, weak: bool = False):
        self.size, self.aug_plus, self.crop_min, self.weak = size, aug_plus, crop_min, weak

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return a view, (3, size, size) uint8."""
        crop = self.crop(image, random)
        return pixels(render(crop.permute(1, 2, 0).numpy(), self.appearance(random)))

    def crop(self, image: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return a random part of the image, (3, size, size) uint8."""
        return random_crop(image, self.size, (self.crop_min, 1.0), random)

    def appearance(self, random: np.random.Generator) -> np.ndarray:
        """Return what happens to a crop, (12,) float32; as many draws whatever comes of them."""
        order, amounts = np.argsort(random.random(4)), 2 * random.random(4) - 1
        jittered, grey, blurred, sigma, flipped = random.random(5)
        # Brightness, contrast, saturation: 0.6 to 1.4; hue: a share of the circle to either side.
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
    """An image (H, W, 3) uint8 and a generator -> a random view of a classifier's training: a crop, flipped or not."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return a view, (3, size, size) uint8."""
        view = random_crop(image, self.size, (0.08, 1.0), random)
        return view.flip(2) if random.random() < 0.5 else view


def random_crop(
    image: np.ndarray, size: int, scale: tuple[float, float], random: np.random.Generator
) -> torch.Tensor:
    """Return a part of the image of random place and shape, resized to (3, size, size).

    Its share of the area is drawn from `scale`, its width over its height between 3/4 and 4/3. Where ten draws do not
    fit into the image, its middle is taken, as wide or high as those proportions allow (torchvision's rule).
    """
    H, W = image.shape[:2]
    for _ in range(10):
        area = H * W * (scale[0] + (scale[1] - scale[0]) * random.random())
        ratio = math.exp(math.log(4 / 3) * (2 * random.random() - 1))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= W and 0 < height <= H:
            top, left = (
                int(random.random() * (H - height + 1)),
                int(random.random() * (W - width + 1)),
            )
            break
    else:
        height, width = min(H, max(1, round(W / (3 / 4)))), min(W, max(1, round(H * (4 / 3))))
        top, left = (H - height) // 2, (W - width) // 2
    return resize(image[top : top + height, left : left + width], size, size)


class CentreView:
    """An image (H, W, 3) uint8 -> its centre crop (3, size, size), with ImageNet's usual border of 32 in 256 pixels."""

    def __init__(self, size: int):
        self.size = size

    def __call__(
        self, image: np.ndarray, random: np.random.Generator | None = None
    ) -> torch.Tensor:
        """Return a view, (3, size, size) uint8."""
        reach = 4 * min(
            image.shape[:2]
        )  # the ends of a strip do not show, and would take gigabytes
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


def resize(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Return (3, height, width) uint8 of an image (H, W, 3): bilinear, antialiased, as PIL does it but for rounding."""
    batch = torch.from_numpy(image)[None].permute(
        0, 3, 1, 2
    )  # strides by which torch sees that channels are last
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def pixels(image: np.ndarray) -> torch.Tensor:
    """Return an image (H, W, 3) as a tensor (3, H, W) over the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


@functools.lru_cache(maxsize=8)
def row_constants(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of a row of pixels, (3 x width,) each, on a device."""
    mean, std = (255 * torch.tensor(values, device=device).repeat(width) for values in (MEAN, STD))
    return mean, std


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Return the network's input from uint8 images (B, 3, H, W): normalised floats, channels last; floats pass."""
    if images.dtype != torch.uint8:
        return images
    B, _, H, W = images.shape
    # Whole rows of pixels at a time: with three numbers at a time this takes six times as long.
    mean, std = row_constants(W, images.device)
    rows = images.permute(0, 2, 3, 1).reshape(B * H, 3 * W).float()
    return rows.sub_(mean).div_(std).view(B, H, W, 3).permute(0, 3, 1, 2)
