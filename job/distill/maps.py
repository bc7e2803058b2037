"""The base of distillers of maps without a matching: a mean of the stages' distances."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from job.distill.base import Distiller
from job.distill.teacher import Teacher
from job.errors import RunError
from job.networks import Outline

STAGES, TO_DISTIL = [1, 2, 3, 4], "stages to distil"
Target = tuple[torch.Size, Any]  # height and width of the teacher's maps, target of `distance`


class MapDistiller(Distiller):
    """The mean over stages of a distance between the maps of student and teacher."""

    compares_pooled = False

    @classmethod
    def misfit(cls, config: Any, student: Outline, teacher: Teacher) -> str:
        """Return which stage's maps are missing or of unequal size, or "" if none are."""
        return unequal_maps(cls.stages(config), config.arch, student, teacher)

    def target(self, stage: int, teacher: torch.Tensor) -> Any:
        """Return the target of `distance` from the teacher's maps (b, T, H, W)."""
        raise NotImplementedError

    def distance(self, stage: int, student: torch.Tensor, target: Any) -> torch.Tensor:
        """Return the distance of the student's maps (b, S, H, W), a mean over the images, ()."""
        raise NotImplementedError

    def targets(
        self,
        teacher: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> dict[int, Target]:
        """Return the targets of the teacher's features {"layerN": (b, T, H, W)}, by stage."""
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
                    f"--teacher {self.config.teacher}: the maps of layer{stage} have "
                    f"{shown(size)} positions; expected {shown(maps.shape[2:])}, as in the "
                    "student. Choose a teacher with the student's strides"
                )
            distances.append(self.distance(stage, maps, target))
        return torch.stack(distances).mean() / self.factor


def unequal_maps(stages: list[int], arch: str, student: Outline, teacher: Teacher) -> str:
    """Return which of `stages` is missing or has maps of unequal size, or "" if none are."""
    teachers = f"the teacher ({teacher.shown})"
    for stage in stages:
        for name, outline in ((arch, student), (teachers, teacher.outline)):
            if stage not in outline.maps:
                has = ", ".join(f"layer{each}" for each in outline.maps) or "no maps"
                return f"{name} has {has}; expected maps of layer{stage}"
        (_, *ours), (_, *theirs) = student.maps[stage], teacher.outline.maps[stage]
        if ours != theirs:
            sizes = f"{shown(ours)} in {arch} and {shown(theirs)} in {teachers}"
            return f"the maps of layer{stage} are {sizes}; expected equal sizes"
    return ""


def shown(size: Sequence[int]) -> str:
    """Return height and width for messages."""
    return " x ".join(map(str, size))
