"""Drawn pictures on which to compare augmentations, and parameters of augmentations.

The pictures have edges and smooth regions with detail at every scale, like photographs.
"""

import cv2
import numpy as np

from job.data.augment import FACTORS, FLIP, NONE, OPERATIONS, SIGMA


def field(random: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """Return smooth noise (height, width, channels) of mean 0 and standard deviation 1.

    The finer the detail, the lower its amplitude.
    """
    total = np.zeros((height, width, channels), dtype=np.float32)
    for cells in (2, 4, 8, 16, 32):
        noise = random.standard_normal((cells, cells, channels)).astype(np.float32) / cells**0.8
        total += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(
            total.shape
        )
    return (total - total.mean()) / total.std()


def photo(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Return a picture like a photograph, with a disc in the foreground.

    Brightness varies more than colour, and some pixels are over- or underexposed.
    """
    random = np.random.default_rng(seed)
    light, colour = field(random, height, width, 1), field(random, height, width, 3)
    values = 120 + 55 * light + 30 * colour + 25 * random.standard_normal(3)
    centre = (int(width * random.uniform(0.3, 0.7)), int(height * random.uniform(0.3, 0.7)))
    image = values.clip(0, 255).astype(np.uint8)
    return cv2.circle(
        image, centre, min(height, width) // 5, random.integers(0, 256, 3).tolist(), -1
    )


def vivid(seed: int, height: int = 60, width: int = 80, spread: float = 1.0) -> np.ndarray:
    """Return strong colours of every hue, or of a fraction `spread` of the hues."""
    random = np.random.default_rng(seed)
    hue, value = (field(random, height, width, 1)[:, :, 0] for _ in range(2))
    hue = 255 * ((random.random() + spread * hue / 2) % 1)
    hsv = np.stack([hue, np.full_like(hue, 200), (150 + 50 * value).clip(40, 255)], axis=2).astype(
        np.uint8
    )
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grey(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Return a picture without colour."""
    random = np.random.default_rng(seed)
    values = (128 + 70 * field(random, height, width, 1)).clip(0, 255).astype(np.uint8)
    return values.repeat(3, axis=2)


def noise(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Return independent random bytes, 0 and 255 among them."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(colour: tuple[int, int, int], height: int = 8, width: int = 8) -> np.ndarray:
    """Return a picture of one colour."""
    return np.full((height, width, 3), colour, dtype=np.uint8)


def ramp(height: int = 32, width: int = 32) -> np.ndarray:
    """Return a grey picture that gets brighter from left to right."""
    return np.broadcast_to(
        np.linspace(0, 155, width).astype(np.uint8)[None, :, None], (height, width, 3)
    ).copy()


PICTURES = {
    f"{make.__name__} {seed}": make(seed)
    for make in (photo, vivid, grey, noise)
    for seed in range(3)
}


def appearance(
    *operations: tuple[int, float], sigma: float = 0.0, flip: bool = False
) -> np.ndarray:
    """Return an appearance (12,): up to five pairs (operation, factor) in order, blur and flip."""
    row = np.zeros(12, dtype=np.float32)
    row[OPERATIONS] = [number for number, _ in operations] + [NONE] * (5 - len(operations))
    row[FACTORS] = [factor for _, factor in operations] + [0.0] * (5 - len(operations))
    row[SIGMA], row[FLIP] = sigma, flip
    return row
