"""Apply an appearance to one image, with OpenCV on the CPU: uint8 arrays (H, W, 3) in RGB.

The operations are torchvision's ColorJitter, RandomGrayscale and GaussianBlur for PIL images.
"""

import cv2
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # grey of R, G, B (ITU-R 601-2)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply every value by the factor."""
    return cv2.convertScaleAbs(image, alpha=factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply every value's distance from the image's mean grey by the factor."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(image, factor, image, 0.0, mean * (1.0 - factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply every pixel's distance from its own grey by the factor: 0 makes it grey."""
    return cv2.transform(image, factor * np.eye(3, dtype=np.float32) + (1.0 - factor) * LUMA)


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Shift every pixel's hue by a fraction of the circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue 0..255
    row = np.zeros(image.shape[1:], dtype=np.uint8)
    row[:, 0] = round(256 * shift) % 256
    hsv += row  # a byte wraps, as the circle does. A whole row at a time is faster than a channel
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


OPERATIONS = (brightness, contrast, saturation, hue)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of standard deviation sigma in pixels, cut off at three of them."""
    kernel = cv2.getGaussianKernel(2 * round(3 * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel)


def render(image: np.ndarray, appearance: np.ndarray) -> np.ndarray:
    """Apply an appearance (12,) of job.data.augment to an image (H, W, 3)."""
    *numbers, sigma, flip = appearance.tolist()
    for operation, factor in zip(numbers[:5], numbers[5:], strict=True):
        if operation >= 0:
            image = OPERATIONS[int(operation)](image, factor)
    if sigma:
        image = blur(image, sigma)
    return cv2.flip(image, 1) if flip else image
