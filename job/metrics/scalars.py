"""The curves of a run: the numbers of its records that are shown, and their tags."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.metrics.schema import kind_of, ratio

# The tags of the kinds of records. Other kinds are not shown.
TAGS = {"step": "steps", "refresh": "refreshes", "factor": "other", "knn": "knn"}
TAGS |= {"collapse": "signs", "validation": "validation", "change": "changes"}
# Fields that identify a record, and are no curves.
KEYS = ("kind", "steps", "epoch", "step", "distiller", "stage")
UNDER = {"distiller": "{}", "stage": "layer{}"}  # fields that follow the kind in a tag


def scalars(
    record: Mapping[str, Any],
    every: int,
    an_epoch: int,
    losses: Sequence[str],
) -> dict[str, float]:
    """Return the numbers of a record by tag, and the ratio of the losses; {} if it is not shown.

    every: show every so many steps' numbers, and those of an epoch's last step.
    an_epoch: steps of an epoch. losses: names of the framework's losses.
    """
    kind = kind_of(record)
    if kind not in TAGS:
        return {}
    done = int(record["step"]) + 1
    if kind == "step" and done % every and done < an_epoch:
        return {}
    shown = {name: number for name, number in record.items() if name not in KEYS}
    if kind == "step" and (of_losses := ratio(record, losses)):
        shown["ratio"] = of_losses
    fields = [form.format(record[name]) for name, form in UNDER.items() if name in record]
    return {"/".join([TAGS[kind], *fields, name]): number for name, number in shown.items()}
