"""The interface of a framework, which trains a student without labels.

A framework is a subclass of Framework in a file of its own, an entry in FRAMEWORKS
(job/frameworks/__init__.py), and a dataclass of its options, from which job/config.py inherits. The
group of its options has the framework's name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from job.metrics import collapse
from job.networks import ARCHS, Network, build_network
from job.options import Options
from job.position import Position

NO_INDICES = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class MicroBatch:
    """The b images of a worker that pass through the networks at a time."""

    images: torch.Tensor  # (b, 3, H, W), normalised: the first view of each image
    position: Position  # of the step
    index: int  # of the micro-batch in the worker's batch, from 0
    first: int  # index of its first image in the total batch
    others: tuple[torch.Tensor, ...] = ()  # further views through the student, like `images`
    indices: torch.Tensor = NO_INDICES  # (b,) int64, of the images in the set; on the CPU


@dataclass(frozen=True)
class Output:
    """The results of a student's forward pass over a micro-batch of b images."""

    losses: dict[str, torch.Tensor]  # () each: means over the images, by name
    # {"layerN": (b, S, H, W)}, before the stage's last ReLU; "fc" (b, dim) if there is a head.
    features: dict[str, torch.Tensor]
    embeddings: torch.Tensor  # (b, dim), L2-normalised, without gradient
    metrics: dict[str, torch.Tensor]  # () each: sums over the images, by name
    others: tuple[dict[str, torch.Tensor], ...] = ()  # features of the further distilled views


def first_layers(config: Options) -> dict[str, Any]:
    """Return the options of the student, except its head's, as arguments of `build_network`."""
    names = ("stem", "width", "zero_init_residual", "image_size")
    return {name: getattr(config, name) for name in names}


def rectified(config: Options, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the student's maps if a ReLU follows each stage, as in a ResNet; else {}."""
    return features if config.arch in ARCHS else {}


class Framework:
    """A self-supervised framework and the student that it trains.

    name: in --framework. losses, metrics: the names in its outputs. reference: the loss of an
    untrained student, or the loss's range, which --loss-share multiplies. reference_text: names it
    in the log. shapes: options that a resume cannot change. stages: `forward` must return their
    features.

    views: random views that it needs of each image. views_name: their name in TensorBoard.
    student_views: the number of views through the student. distilled_views: the number of these
    whose features are distilled.

    module: all that is trained, saved and restored. encoder: the student in it, which maps images
    (b, 3, H, W) to {"layerN": (b, S, H, W)} at least, and to "fc" (b, dim) if it has a head.
    head_dim: d, the width of the head's output; 0: no head.
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
        """Return a new network with the student's options and `dim` outputs."""
        return build_network(self.config.arch, dim, mlp, **first_layers(self.config))

    def distil(self, views: int) -> None:
        """Pass at least `views` views of each image through the student, and distil them."""
        self.views = max(self.views, views)
        self.student_views = max(self.student_views, views)
        self.distilled_views = max(self.distilled_views, views)

    def networks(self) -> list[nn.Module]:
        """Return the networks that --compile compiles."""
        return [self.encoder]

    def constant_rate(self) -> list[nn.Parameter]:
        """Return the parameters whose learning rate is always --lr, without the schedule."""
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
        """Start a step, and return the argument `prepared` of `forward` and `after_update`.

        views: `self.views` x (B, 3, H, W) uint8.
        """

    def forward(self, batch: MicroBatch, prepared: Any) -> Output:
        """Run the student on a micro-batch."""
        raise NotImplementedError

    def after_update(self, prepared: Any) -> None:
        """End a step, after the optimizer's update."""

    def signs(self, output: Output) -> dict[str, float]:
        """Return the signs of collapse, by name. A collective.

        output: of the step's last micro-batch.
        """
        return collapse.signs(output.embeddings, rectified(self.config, output.features))

    def warnings(self, signs: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} about the signs of collapse, with their likely causes."""
        return collapse.warnings(signs)

    def describe(self, numbers: dict[str, float]) -> str:
        """Return a step's metrics, means over the images, for the log."""
        return ", ".join(f"{name} {numbers[name]:.4g}" for name in self.metrics)

    def expected(self) -> list[str]:
        """Return sentences about the normal course of training, for the start of the log."""
        return []

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} about options that do not fit this number of images."""
        return {}

    def hints(self, means: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} about unusual values in the means of some steps' records."""
        return {}
