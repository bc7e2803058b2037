"""The parts of the loss in a step's record: the framework's losses have their names between `loss` and `distillation`."""

from collections.abc import Iterable, Mapping


def own_losses(record: Iterable[str]) -> list[str]:
    """Return the names of the framework's losses among those of a record, in its order; none for a classifier's."""
    names = list(record)
    if not {"loss", "distillation"} <= set(names):
        return []
    return names[names.index("loss") + 1 : names.index("distillation")]


def ratio(record: Mapping[str, float]) -> float | None:
    """Return the distillation loss over the sum of the framework's losses; None if there is none of either."""
    own = sum(record[name] for name in own_losses(record))
    return record["distillation"] / own if own and record["distillation"] else None
