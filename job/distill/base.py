"""The base of a distiller: a loss between the features of the student and a frozen teacher.

A distiller is a subclass in its own file and an entry in DISTILLERS (job/distill/__init__.py). Its
options are a dataclass from which job/config.py inherits. Their group has the distiller's name.

Only `loss` is necessary. Override `stages` to use other stages than the last. MapDistiller
(maps.py) is the base for maps: it checks that student and teacher have them, in equal sizes.
`pooled` (pooled.py) returns the pooled features of either network.
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
from job.schedules import distillation_strength


@dataclass(frozen=True)
class Networks:
    """The input of a distiller's measurements between epochs."""

    run: Run
    images: Images
    framework: Framework
    teacher: Teacher


@dataclass(frozen=True)
class Change:
    """A measured change of a distiller.

    state: new values of tensors in the distiller's `module`, by name. `Distiller.apply` sets them.
    record: logs and records the change. Call it first.
    """

    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    record: Callable[[], None] = lambda: None


class Distiller:
    """A loss between the student's features and the teacher's.

    name: its name in --distill.
    shapes: the options that determine the shapes of its tensors. A resume cannot change them.
    views: the number of views of each image that it needs at least.
    batch_statistics: measure --loss-share with the statistics of the student's batches. A loss
    without a batch norm of its own needs them, because the running statistics of an untrained
    student differ greatly from those in training.
    compares_pooled: whether its loss uses the pooled features.
    module: all tensors that are trained, saved and restored. Its buffer `factor`, () float64,
    divides the loss. `with_change` copies only the module, so keep no tensor elsewhere.
    """

    name: str
    shapes: tuple[str, ...] = ()
    views: int = 1
    batch_statistics: bool = False
    compares_pooled: bool = True
    config: DistillOptions
    module: nn.Module

    def __init__(self, config: Any, widths: Mapping[Any, int], teacher: Teacher):
        """Build `module`.

        widths: the channels of the student's stages {stage: S} and of its pooled features
        {"pooled": S}, and the outputs of its framework's head {"fc": d}, 0 without one.
        teacher.widths: the same of the teacher, without the head: {stage: T, "pooled": T}.
        RunError: the teacher does not fit the student.
        """
        self.config, self.module = config, nn.Module()
        self.module.register_buffer("factor", torch.tensor(config.loss_factor, dtype=torch.float64))

    @staticmethod
    def stages(config: Any) -> list[int]:
        """Return the stages whose features the distiller needs, counted from 1."""
        return [DEPTH]

    @classmethod
    def misfit(cls, config: Any, student: Outline, teacher: Teacher) -> str:
        """Return why the distiller cannot compare student and teacher, or "" if it can.

        The text is "problem; expected E", for an error.
        """
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
        """Return whether --head-width sets the width of a head of the distiller.

        dims: outputs of the framework's head and of the teacher's. Without them, return whether
        the distiller can have such a head.
        """
        return "head_width" in cls.shapes

    @property
    def factor(self) -> torch.Tensor:
        """The divisor of the loss, () float64."""
        return self.module.get_buffer("factor")

    def targets(self, teacher: Mapping[str, torch.Tensor], generator: torch.Generator) -> Any:
        """Return the targets for `loss`, without gradients. The caller then releases `teacher`.

        teacher: features {"layerN": (b, T, H, W)} of `stages`. With --precision bf16 they can be
        bfloat16. If a distiller of the run `needs_head`, also "fc" (b, d), the outputs of the
        teacher's head. If one has a `momentum`, also "momentum_encoder" (b, S), the momentum
        encoder's pooled features.
        generator: for random targets.
        """
        return teacher

    def loss(self, student: Mapping[str, torch.Tensor], targets: Any) -> torch.Tensor:
        """Return the loss, () float32 or float64: a mean over the images, divided by `factor`.

        With --precision bf16 it runs under autocast: compute distances in float32. It is called
        once for each view.
        student: features {"layerN": (b, S, H, W)} of `stages`, and "fc" (b, d), the outputs of the
        framework's head, if it has one.
        """
        raise NotImplementedError

    def to_gather(self, targets: Any) -> torch.Tensor | None:
        """Return the rows (b, ...) of a micro-batch's targets for `after_update`, or None."""
        return None

    def after_update(self, gathered: torch.Tensor) -> None:
        """End a step, after the optimizer's update.

        gathered: the rows of the total batch, (NB, ...), in the same order for any number of
        workers.
        """

    def weight(self, position: Position, steps: int) -> float:
        """Return the strength of the distillation at a step, 0 to 1. steps: of an epoch."""
        if not self.config.loss_ramp:
            return 1.0
        return distillation_strength(*position, self.config.epochs, steps)

    def before_epoch(self, epoch: int, networks: Networks) -> Change:
        """Return the measured change for an epoch, counted from 0. A collective.

        Do not apply or record it: a signal can still stop the next distiller's measurement.
        Stopped, on all workers: a signal arrived.
        """
        return Change()

    def apply(self, change: Change) -> None:
        """Apply a change."""
        state = self.module.state_dict()
        for name, value in change.state.items():
            state[name].copy_(value)

    def with_change(self, change: Change) -> Self:
        """Return a copy to which a change is applied."""
        changed = copy.copy(self)
        changed.module = copy.deepcopy(self.module)
        changed.apply(change)
        return changed

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} of warnings about options that do not suit the number of images."""
        return {}

    def check(self, saved: Mapping[str, torch.Tensor]) -> None:
        """RunError: a checkpoint's state of `module` has another teacher or other options."""

    def histograms(self) -> dict[str, np.ndarray]:
        """Return the distributions that TensorBoard shows at the start of an epoch, by name."""
        return {}
