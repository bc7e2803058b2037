"""The names and sizes of a network's features."""

from dataclasses import dataclass, field

DEPTH = 4  # stages: layer1 to layer4
HEAD = "fc"  # the head's outputs, (b, dim)
POOLED = "flatten"  # the features under the head, (b, C), if they are the output
# The same, in addition to the last stage's maps, for networks other than torchvision's ResNets.
UNDER_HEAD = "pooled"


@dataclass(frozen=True)
class Outline:
    """The features of a network for images of a size.

    pooled: C of the features under the head, (b, C). maps: (C, H, W) of each stage's maps. A
    network with fewer than four stages has the later ones. A network without maps has {}.
    beyond: a parameter that works on the pooled features but not on the last maps, or "".
    """

    pooled: int
    maps: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    beyond: str = ""

    @property
    def widths(self) -> dict[int | str, int]:
        """The channels of each stage's maps, {stage: C}, and of the pooled features."""
        return {stage: C for stage, (C, _, _) in self.maps.items()} | {UNDER_HEAD: self.pooled}
