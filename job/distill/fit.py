"""Check that the distillers of a run can compare its student and its teacher."""

from typing import Any

from job.distill.base import Distiller
from job.distill.maps import MapDistiller
from job.distill.teacher import Teacher
from job.errors import RunError
from job.networks import Outline


def check_fit(
    config: Any,
    kinds: list[type[Distiller]],
    every: dict[str, type[Distiller]],
    student: Outline,
    teacher: Teacher,
) -> None:
    """Check that the chosen distillers `kinds` can compare student and teacher.

    every: all distillers by name. RunError: they cannot. It lists the distillers that can.
    """
    for kind in kinds:
        if misfit := kind.misfit(config, student, teacher):
            fitting = list_fitting(config, every, student, teacher)
            raise RunError(f"--distill {kind.name}: {misfit}. Use one of: {fitting}")
    if config.framework == "none" and student.beyond and not any(k.compares_pooled for k in kinds):
        pooled = ", ".join(name for name, kind in every.items() if kind.compares_pooled)
        raise RunError(
            f"--framework none: no chosen distiller trains {student.beyond} of {config.arch}, "
            f"which works on the pooled features; expected one of {pooled}. Add one to --distill"
        )


def list_fitting(
    config: Any, every: dict[str, type[Distiller]], student: Outline, teacher: Teacher
) -> str:
    """Return the distillers that can compare a student and a teacher, for a message."""
    named = []
    for name, kind in every.items():
        if not kind.misfit(config, student, teacher):
            named.append(name if teacher.has_head or not kind.needs_head(config) else "")
    sizes = teacher.outline.maps
    equal = [
        stage for stage, (_, *size) in student.maps.items() if size == [*sizes.get(stage, ())][1:]
    ]
    if equal:
        stages = " ".join(map(str, equal))
        named += [
            f"{name} with --{name}-stages {stages}"
            for name, kind in every.items()
            if name not in named
            and issubclass(kind, MapDistiller)
            and hasattr(config, f"{name}_stages")
        ]
    return ", ".join(filter(None, named))
