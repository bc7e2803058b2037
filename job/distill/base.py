"""The base of a distiller: a loss between the features of the student and a frozen teacher.

A distiller is a subclass in its own file, an entry in DISTILLERS (job/distill/__init__.py), and a
dataclass of options, from which job/config.py inherits. The options' group is named after it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from job.data.images import Images
from job.distill.options import DistillOptions
from job.distill.teacher import Teacher
from job.engine.run import Run
from job.frameworks.base import Framework
from job.networks import DEPTH, Outline
from job.position import Position
from job.schedules import pull


@dataclass(frozen=True)
class Networks:
    """The run, the images, the student's framework and the teacher, which a distiller measures between epochs."""

    run: Run
    images: Images
    framework: Framework
    teacher: Teacher


@dataclass(frozen=True)
class Change:
    """A measured change of a distiller.

    `record` logs and records it; `Distiller.apply` makes it afterwards.

    state: new values of tensors in the distiller's `module`, by name.
    """

    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    record: Callable[[], None] = lambda: None


class Distiller:
    """A loss between the student's features and the teacher's.

    name: in --distill. shapes: options that shape its tensors. module: all that is trained, saved and restored; its buffer
    `factor`, () float64, divides the loss. A distiller keeps no tensor elsewhere: `with_change` copies `module` only.
    widths: channels of the student's stages, {stage: S}, of its pooled features, {"pooled": C}, and outputs
    of its framework's head, {"fc": d}, 0 without one. compares_pooled: its loss uses the pooled features.
    views: of each image, that it distils at least. batch_statistics: --loss-share is measured with
    the statistics of the student's batches. A loss without a batch norm of its own needs them: the
    running ones of an untrained student are far from those of its training.
    """

    name: str
    shapes: tuple[str, ...] = ()
    views: int = 1
    batch_statistics: bool = False
    compares_pooled: bool = True
    config: DistillOptions
    module: nn.Module

    def __init__(self, config: Any, widths: Mapping[Any, int], teacher: Teacher):
        """RunError: the teacher does not fit the student."""
        self.config, self.module = config, nn.Module()
        self.module.register_buffer("factor", torch.tensor(config.loss_factor, dtype=torch.float64))

    @staticmethod
    def stages(config: Any) -> list[int]:
        """Return the stages, from 1, whose features the distiller needs."""
        return [DEPTH]

    @classmethod
    def misfit(cls, config: Any, student: Outline, teacher: Teacher) -> str:
        """Return how the features of student and teacher do not fit the distiller, or ""."""
        return ""

    @staticmethod
    def needs_head(config: Any) -> bool:
        """Return whether the distiller needs the outputs of the teacher's head, "fc" (b, d)."""
        return False

    @staticmethod
    def momentum(config: Any) -> float | None:
        """Return the momentum of the encoder whose features the distiller needs, or None.

        The distillers of a run share one momentum encoder, which has the highest momentum.
        """
        return None

    @classmethod
    def has_hidden_layer(cls, config: Any, dims: tuple[int, int] | None = None) -> bool:
        """Return whether --head-width widens a head of the distiller, or may do so without `dims`.

        dims: outputs of the framework's head and of the teacher's, if known.
        """
        return "head_width" in cls.shapes

    @property
    def factor(self) -> torch.Tensor:
        """The divisor of the loss, () float64."""
        return self.module.get_buffer("factor")

    def targets(self, teacher: Mapping[str, torch.Tensor], generator: torch.Generator) -> Any:
        """Return the targets of `loss` from the teacher's features {"layerN": (b, T, H, W)}.

        The features themselves are released.

        They have "fc" (b, d), its head's outputs, if a distiller of the run `needs_head`, and
        "momentum_encoder" (b, S), the momentum encoder's pooled features, if one has a `momentum`.
        generator: for random targets.
        """
        return teacher

    def loss(self, student: Mapping[str, torch.Tensor], targets: Any) -> torch.Tensor:
        """Return the loss of the student's features {"layerN": (b, S, H, W)}, a mean over the images divided by `factor`, ().

        They have "fc" (b, d), the outputs of the framework's head, if there is one.
        """
        raise NotImplementedError

    def remembered(self, targets: Any) -> torch.Tensor | None:
        """Return what `after_update` needs of a micro-batch's targets, (b, ...), or None."""
        return None

    def after_update(self, remembered: torch.Tensor) -> None:
        """End a step, after the optimizer's update.

        remembered: of the total batch, (B, ...), in its order, which is the same for any number of workers.
        """

    def weight(self, position: Position, steps: int) -> float:
        """Return the weight of the loss at a step of an epoch of `steps`."""
        return pull(*position, self.config.epochs, steps) if self.config.loss_ramp else 1.0

    def before_epoch(self, epoch: int, networks: Networks) -> Change:
        """Measure, and return the change for an epoch, counted from 0. A collective.

        It changes and records nothing, because a signal can still stop the next distillers.
        Stopped, on all workers: a signal arrived.
        """
        return Change()

    def apply(self, change: Change) -> None:
        """Make a change."""
        state = self.module.state_dict()
        for name, value in change.state.items():
            state[name].copy_(value)

    def with_change(self, change: Change) -> Self:
        """Return a copy in which a change is made."""
        changed = copy.copy(self)
        changed.module = copy.deepcopy(self.module)
        changed.apply(change)
        return changed

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} of the options that do not fit so many images."""
        return {}

    def check(self, saved: Mapping[str, torch.Tensor]) -> None:
        """RunError: a checkpoint's state of `module` belongs to another teacher or to other options."""

    def histograms(self) -> dict[str, np.ndarray]:
        """Return the distributions that TensorBoard shows at the start of an epoch, by name."""
        return {}
