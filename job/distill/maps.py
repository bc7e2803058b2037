"""The common part of the distillers of maps without a matching: the mean of a distance a stage."""

from collections.abc import Mapping
from typing import Any

import torch

from job.distill.base import Distiller
from job.errors import RunError

STAGES, TO_DISTIL = [1, 2, 3, 4], "stages to distil"
Target = tuple[torch.Size, Any]  # height and width of the teacher's maps; the target of `distance`


class MapDistiller(Distiller):
    """A mean over stages of a distance between the student's maps and the teacher's."""

    def target(self, stage: int, teacher: torch.Tensor) -> Any:
        """Return what `distance` needs of the teacher's maps (b, T, H, W)."""
        raise NotImplementedError

    def distance(self, stage: int, student: torch.Tensor, target: Any) -> torch.Tensor:
        """Return the distance of the student's maps (b, S, H, W), a mean over the images, ()."""
        raise NotImplementedError

    def targets(
        self,
        teacher: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> dict[int, Target]:
        """Return the targets of the teacher's features {"layerN": (b, T, H, W)} by stage."""
        maps = {stage: teacher[f"layer{stage}"] for stage in self.stages(self.config)}
        return {stage: (t.shape[2:], self.target(stage, t)) for stage, t in maps.items()}

    def loss(
        self,
        student: Mapping[str, torch.Tensor],
        targets: Mapping[int, Target],
    ) -> torch.Tensor:
        """Return the loss of the student's features {"layerN": (b, S, H, W)}, ().

        RunError: a stage's maps have another height or width than the teacher's.
        """
        distances = []
        for stage, (size, target) in targets.items():
            maps = student[f"layer{stage}"]  # (b, S, H, W)
            if maps.shape[2:] != size:
                raise RunError(
                    f"--teacher {self.config.teacher}: its maps of layer{stage} have {shown(size)} "
                    f"positions; expected {shown(maps.shape[2:])}, as the student's have. "
                    "Choose a teacher with the student's strides"
                )
            distances.append(self.distance(stage, maps, target))
        return torch.stack(distances).mean() / self.factor


def shown(size: torch.Size) -> str:
    """Return height and width for messages."""
    return " x ".join(map(str, size))
