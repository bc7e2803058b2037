"""The parts of a framework: what trains a student without labels, alone or with distillers.

A framework is a class of this kind in a file of its own, an entry in FRAMEWORKS (job/frameworks/__init__.py), and a
dataclass of its own options, of which job/config.py inherits. The name of its options' group is the framework's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from job.metrics import collapse
from job.networks import ARCHS, Network, build_network
from job.options import Options
from job.position import Position


@dataclass(frozen=True)
class MicroBatch:
    """The images of a worker that pass through the networks at a time."""

    images: torch.Tensor  # (b, 3, H, W), normalised: the first view of each
    position: Position  # of the step
    part: int  # number of the micro-batch in the worker's batch, from 0
    first: int  # index of its first image in the total batch
    others: tuple[torch.Tensor, ...] = ()  # the further views that pass through the student, alike


@dataclass(frozen=True)
class Output:
    """The results of a student's forward pass over a micro-batch of b images."""

    losses: dict[str, torch.Tensor]  # () each: means over the images, by name
    features: dict[
        str, torch.Tensor
    ]  # {"layerN": (b, S, H, W)}, before the stage's last ReLU; "fc" (b, d) of a head
    embeddings: torch.Tensor  # (b, d), L2-normalised, without gradient
    metrics: dict[str, torch.Tensor]  # () each: sums over the images, by name
    others: tuple[dict[str, torch.Tensor], ...] = ()  # features of the further distilled views


def first_layers(config: Options) -> dict[str, Any]:
    """Return the student's options that `build_network` takes besides those of its head."""
    names = ("stem", "width", "zero_init_residual", "image_size")
    return {name: getattr(config, name) for name in names}


def rectified(config: Options, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the student's maps if a ReLU follows each stage, as in a ResNet; else nothing."""
    return features if config.arch in ARCHS else {}


class Framework:
    """A self-supervised framework and the student that it trains.

    name: in --framework. losses, metrics: the names in its outputs. views: random views of each
    image that it needs; views_name: in TensorBoard; student_views: those that pass through the student; distilled_views: those
    of them whose features are distilled. reference: the loss of a student that knows nothing, or
    its range; --loss-share is relative to it. shapes: options that a resume cannot change.
    stages: those whose features `forward` must give. module: all that is trained, saved and restored.
    encoder: the student in it, images (b, 3, H, W) -> {"layerN": (b, S, H, W)} at least, and "fc" (b, d) of a head.
    head_dim: d, the head's outputs; 0: there is no head.
    """

    name: str
    losses: tuple[str, ...]
    reference: float
    reference_text: str = "the framework's reference loss"
    metrics: tuple[str, ...] = ()
    views: int = 1
    views_name: str = "random"
    student_views: int = 1
    distilled_views: int = 1
    shapes: tuple[str, ...] = ()
    head_dim: int = 0
    module: nn.Module
    encoder: nn.Module

    config: Options

    def __init__(self, config: Any, stages: list[int]):
        self.config = config

    def network(self, dim: int = 128, mlp: bool = False) -> Network:
        """Return a new network of the student's options, whose `fc` gives `dim` outputs."""
        return build_network(self.config.arch, dim, mlp, **first_layers(self.config))

    def distil(self, views: int) -> None:
        """Let `views` views of each image at least pass through the student and be distilled."""
        self.views = max(self.views, views)
        self.student_views = max(self.student_views, views)
        self.distilled_views = max(self.distilled_views, views)

    def networks(self) -> list[nn.Module]:
        """Return the networks that --compile compiles."""
        return [self.encoder]

    def constant_rate(self) -> list[nn.Parameter]:
        """Return the parameters whose learning rate is always --lr, whatever its schedule."""
        return []

    def student(self) -> Network:
        """Return a copy of the student, with an untrained head."""
        net = self.network()
        body = {
            name: value
            for name, value in self.encoder.state_dict().items()
            if not name.startswith("fc.")
        }
        net.load_state_dict(body, strict=False)
        return net.to(next(self.encoder.parameters()).device)

    def prepare(self, views: list[torch.Tensor], position: Position) -> Any:
        """Begin a step; return what `forward` and `after_update` need of it.

        views: `self.views` x (B, 3, H, W) uint8.
        """

    def forward(self, batch: MicroBatch, prepared: Any) -> Output:
        """Run the student on a micro-batch."""
        raise NotImplementedError

    def after_update(self, prepared: Any) -> None:
        """End a step, after the optimizer's update."""

    def signs(self, output: Output) -> dict[str, float]:
        """Return the signs of collapse of a step's last micro-batch over all workers, for its record. A collective."""
        return collapse.signs(output.embeddings, rectified(self.config, output.features))

    def warnings(self, signs: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} of the signs of collapse, with their likely causes."""
        return collapse.warnings(signs)

    def describe(self, numbers: dict[str, float]) -> str:
        """Return a step's metrics, means over the images, for the log."""
        return ", ".join(f"{name} {numbers[name]:.4g}" for name in self.metrics)

    def expected(self) -> list[str]:
        """Return the normal course of a training, a sentence each, for the log of its start."""
        return []

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} of the options that do not fit so many images."""
        return {}

    def hints(self, means: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} of what is not normal in the means of some steps' records."""
        return {}
