"""Fashion-MNIST's images of clothes, as Debian's package dataset-fashion-mnist has them."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from job.errors import RunError

FASHION = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
SIDE = 28  # pixels
INSTALL = "apt-get install dataset-fashion-mnist"


def read_part(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n, SIDE, SIDE) and the labels (n,) of a part, train or t10k, uint8.

    RunError: the package is not installed, or a file is damaged.
    """
    if not FASHION.is_dir():
        raise RunError(f"fashion: no {FASHION}; expected Debian's package. Run {INSTALL}")
    images = read_idx(FASHION / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(FASHION / f"{name}-labels-idx1-ubyte.gz")
    most = labels.max(initial=0)
    if images.shape != (len(labels), SIDE, SIDE) or labels.ndim != 1 or most >= len(CLASSES):
        shapes = f"{images.shape} images, {labels.shape} labels up to {most}"
        expected = f"images of {SIDE}x{SIDE} with a label below {len(CLASSES)} each"
        raise RunError(f"fashion: {FASHION}/{name}-*: {shapes}; expected {expected}. {reinstall()}")
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a compressed IDX file of bytes, uint8.

    RunError: it is missing or damaged.

    An IDX file has two zeros, the type (8: bytes), the number of dimensions, a big-endian size
    of 4 bytes for each, and the values.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        dims = content[3]
        shape = np.frombuffer(content, ">u4", dims, 4)
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, LookupError, ValueError, zlib.error) as error:
        expected = f"expected a compressed IDX file. {reinstall()}"
        raise RunError(f"fashion: {path}: {error}; {expected}") from None


def reinstall() -> str:
    """Return the fix for a damaged file."""
    return f"Run {INSTALL.replace('install', '--reinstall install')}"
