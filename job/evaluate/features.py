"""Features of images by a frozen network, with the same bytes for any number of workers.

A forward pass always has GROUP images, because kernels, and so the last bits, depend on their
number. They do not depend on the other images of the group or on an image's position in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from job.checkpoints.foreign import Backbone
from job.cluster.objects import allgather
from job.data.augment import CentreView, normalize
from job.data.images import Images
from job.engine.run import Run
from job.errors import RunError
from job.networks import HEAD, POOLED, EncoderFeatures, build_head, with_features
from job.text import printable

GROUP = 64
Group = tuple[torch.Tensor, dict[int, str]]  # features (n, C); {index: problem} of the others


@dataclass(frozen=True)
class Pass:
    """How groups of images become features. loaders: loader processes of each worker."""

    encoder: nn.Module  # (b, 3, H, W) -> {node: (b, C)}
    image_size: int
    precision: str
    loaders: int
    run: Run

    @property
    def width(self) -> int:
        """C, the number of features of an image."""
        side = self.image_size if isinstance(self.encoder, EncoderFeatures) else 32
        return self.forward(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features (n, C) float32 of pixels (n, 3, H, W) uint8, n <= GROUP, on the CPU.

        Black images complete the group.
        """
        n = len(pixels)
        group = F.pad(pixels.permute(0, 2, 3, 1), (0,) * 7 + (GROUP - n,))  # (GROUP, H, W, 3)
        inputs = normalize(group.permute(0, 3, 1, 2).to(self.run.device))
        with self.run.autocast(self.precision):
            (features,) = self.encoder(inputs).values()  # (GROUP, C)
        return features[:n].float().cpu()

    def rounds(self, images: Images, groups: list[range]) -> Iterator[list[Group]]:
        """Yield the groups that the workers compute at a time, one each, in order. A collective.

        Stopped, on all workers: a signal arrived.
        """
        mine = groups[self.run.rank :: self.run.size]
        views = MarkedCrops(images, self.image_size)
        batches = self.run.batches(views, mine, self.loaders)
        for done in self.run.rounds(-(-len(groups) // self.run.size)):
            computed = []
            if done <= len(mine):  # a worker can have one group less than rank 0
                pixels, decodable, errors = next(batches)  # (n, 3, H, W) uint8, (n,) bool
                features = self.forward(pixels)[decodable]
                computed.append((features, problems(images, mine[done - 1], decodable, errors)))
            gathered = allgather(computed, "features")
            yield [group for of_worker in gathered for group in of_worker]


class MarkedCrops(Dataset):
    """index -> centre crop (3, H, W) uint8, whether the image is decodable, [its error]."""

    def __init__(self, images: Images, size: int):
        self.images, self.view = images, CentreView(size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool, list[str]]:
        image, _, bad = self.images.read(index)
        return self.view(image), not bad, bad


def problems(
    images: Images,
    group: range,
    decodable: torch.Tensor,
    errors: list[str],
) -> dict[int, str]:
    """Return {index: problem} of a group's undecodable images. decodable: (n,) bool."""
    bad = [index for index, good in zip(group, decodable.tolist(), strict=True) if not good]
    starts = [f"{printable(images.path(index))}: " for index in bad]
    texts = [text.removeprefix(start) for text, start in zip(errors, starts, strict=True)]
    return dict(zip(bad, texts, strict=True))


def split_groups(images: Images) -> list[range]:
    """Return the indices of each group."""
    total = len(images)
    return [range(first, min(first + GROUP, total)) for first in range(0, total, GROUP)]


def build_encoder(weights: Backbone, head: bool, shown: str, image_size: int = 224) -> nn.Module:
    """Return a frozen network, (b, 3, H, W) -> {node: (b, C)}: its pooled features.

    head: the outputs of its head instead. shown: the checkpoint, for the error.
    RunError: the network has no head of linear layers, or cannot process images of that size.
    """
    net = weights.build(image_size)
    if head:
        assert isinstance(net.fc, nn.Linear)
        net.set_submodule("fc", find_head(weights, net.fc.in_features, shown))
    return with_features(net, [], HEAD if head else POOLED).eval().requires_grad_(False)


def find_head(weights: Backbone, width: int, shown: str) -> nn.Sequential:
    """Return the head of a checkpoint, (b, width) -> (b, C). RunError: it has no such head."""
    problem = "no head"
    if weights.head_state:
        problem = f"its head ({weights.head}) has other layers"
        try:
            head = build_head(weights.head_state)
            if getattr(head[0], "in_features", 0) == width:
                return head
        except ValueError as error:
            problem += f": {error}"
    expected = f"expected linear layers on {width} features"
    raise RunError(f"--head: {shown}: {problem}; {expected}. Leave out --head")
