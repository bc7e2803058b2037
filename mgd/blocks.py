"""Maps in blocks that a core's cache holds."""

from collections.abc import Iterator

import torch

NUMBERS = 2**18  # of the first maps: 1 MB of float32


def blocks(*maps: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield maps (B, ...), of the same images, together in blocks of some of these; on a GPU all at once.

    What goes over maps several times does so block by block: then their numbers come from memory once, and what is
    computed between needs no memory that the kernel would have to give, and to clear, each time.
    """
    B = len(maps[0])
    images = max(1, B * NUMBERS // max(1, maps[0].numel())) if maps[0].device.type == "cpu" else B
    return zip(*(of_all.split(images) for of_all in maps), strict=True)
