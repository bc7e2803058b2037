"""Split maps into blocks that fit into the cache of a CPU core."""

from collections.abc import Iterator

import torch

NUMBERS = 2**18  # values of the first maps in a block: 1 MB of float32


def blocks(*maps: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield maps (B, ...) of the same images in blocks of a few images, on a GPU in one block.

    Use it for several passes over the same maps. Each block is then read from memory once. Its
    intermediate results are small, so the kernel need not allocate and clear pages each time.
    """
    B = len(maps[0])
    images = max(1, B * NUMBERS // max(1, maps[0].numel())) if maps[0].device.type == "cpu" else B
    return zip(*(of_all.split(images) for of_all in maps), strict=True)
