"""Networks other than torchvision's ResNets, with the names `body` and `fc`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from job.networks.outline import DEPTH, HEAD, POOLED, UNDER_HEAD

Maps = dict[int, torch.Tensor]  # {stage: (b, C, H, W)}
# body, images (b, 3, H, W), stages -> pooled features (b, C), maps of the stages that it has
Pass = Callable[[nn.Module, torch.Tensor, list[int]], tuple[torch.Tensor, Maps]]


class Input(nn.Module):
    """A network's input: normalised by its own mean and deviation, and of its own size.

    size: side of the images that the network requires, 0 for any. scale, shift: of each colour, 3
    numbers each. The input is scale * image + shift. A state dict has no entry of it.
    """

    def __init__(
        self,
        size: int = 0,
        scale: tuple[float, ...] = (1.0, 1.0, 1.0),
        shift: tuple[float, ...] = (0.0, 0.0, 0.0),
    ):
        super().__init__()
        self.size, self.same = size, set(scale) == {1.0} and set(shift) == {0.0}
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input (b, 3, H', W') of images (b, 3, H, W), normalised by ImageNet's mean."""
        if not self.same:
            images = images * self.get_buffer("scale") + self.get_buffer("shift")
        if self.size and images.shape[2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images


class Encoder(nn.Module):
    """A network and a head, images (b, 3, H, W) -> (b, dim).

    body: the network, whose output is its pooled features (b, C). run: a pass through it with
    maps. fc: the head. norms: names in `body` of the batch norms in which stages end.
    channels_last: whether the body supports this layout.
    """

    def __init__(
        self,
        body: nn.Module,
        run: Pass,
        fc: nn.Module,
        norms: dict[int, str],
        channels_last: bool,
    ):
        super().__init__()
        self.body, self.fc, self.run, self.norms = body, fc, run, norms
        self.channels_last = channels_last
        self.input = Input()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the head's outputs."""
        return self.fc(self.run(self.body, self.input(images), [])[0])


class EncoderFeatures(nn.Module):
    """An encoder as a module that returns a dict of tensors, with the same parameters and names.

    "layer1".."layer4" for each of `stages` that the network has, (b, C, H, W), with the last also
    "pooled" (b, C). In addition `output`: "fc" (b, dim), "flatten" (b, C), or None.
    """

    def __init__(self, net: Encoder, stages: list[int], output: str | None):
        super().__init__()
        self.input, self.body, self.run = net.input, net.body, net.run
        self.channels_last = net.channels_last
        if output == HEAD:
            self.fc = net.fc
        self.stages, self.output = stages, output

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features of images (b, 3, H, W), normalised by ImageNet's mean."""
        pooled, maps = self.run(self.body, self.input(images), self.stages)
        features: dict[str, Any] = {f"layer{stage}": value for stage, value in maps.items()}
        if DEPTH in self.stages:
            features[UNDER_HEAD] = pooled
        if self.output == HEAD:
            features[HEAD] = self.fc(pooled)
        elif self.output == POOLED:
            features[POOLED] = pooled
        return features
