"""The curves of a run: which numbers of its records are shown, and under which tags."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.metrics.schema import kind_of, ratio

# The tag of a kind of record; the others are not shown.
TAGS = {"step": "steps", "refresh": "refreshes", "factor": "other", "knn": "knn"}
TAGS |= {"collapse": "signs", "validation": "validation", "change": "changes"}
PLACE = ("kind", "steps", "epoch", "step", "distiller", "stage")  # where a record belongs
UNDER = {"distiller": "{}", "stage": "layer{}"}  # fields that a tag has after its kind's


def scalars(
    record: Mapping[str, Any],
    every: int,
    an_epoch: int,
    losses: Sequence[str],
) -> dict[str, float]:
    """Return the numbers of a record by tag, and the ratio of the losses; {} if it is not shown.

    every: of so many steps the numbers of one are shown, and those of an epoch's last.
    an_epoch: steps of an epoch. losses: names of the framework's losses.
    """
    kind = kind_of(record)
    if kind not in TAGS:
        return {}
    done = int(record["step"]) + 1
    if kind == "step" and done % every and done < an_epoch:
        return {}
    shown = {name: number for name, number in record.items() if name not in PLACE}
    if kind == "step" and (found := ratio(record, losses)):
        shown["ratio"] = found
    fields = [form.format(record[name]) for name, form in UNDER.items() if name in record]
    return {"/".join([TAGS[kind], *fields, name]): number for name, number in shown.items()}
