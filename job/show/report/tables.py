"""A report's tables: how far each run is, linear results, options that differ, checkpoints, warnings."""

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from job.config import WITHOUT_EFFECT, Config, LinearConfig
from job.metrics.schema import own_size
from job.show.read.history import network, smooth
from job.show.read.runs import Shown
from job.show.watch.panel import span
from job.show.watch.state import RECENT

MOST_WARNINGS = 20  # of a run


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a head. numbers: the columns that are set to the right."""

    head: list[str]
    rows: list[list[str]]
    numbers: range = range(0)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's file. link: its address from where the report lies."""

    run: str
    name: str
    link: str
    size: str
    age: str


def shown(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number in a table; a dash for none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}{unit}"


def last(run: Shown, name: str) -> float | None:
    """The mean of a number over a run's last steps, or None."""
    values = run.column(name)
    return float(smooth(values, max(1, min(RECENT, len(values) // 4)))[-1]) if len(values) else None


def overview(runs: Sequence[Shown]) -> Table:
    """How far each run is, and where its numbers are."""
    head = [
        "run",
        "state",
        "network",
        "teacher",
        "epochs",
        "loss",
        "ratio",
        "contrast acc.",
        "k-NN top-1",
        "images/s",
        "time",
        "warnings",
    ]
    rows = []
    for run in runs:
        history, options = run.history, run.history.options
        took = run.step_seconds
        own = own_size({name: last(run, name) or 0.0 for name in history.losses}, history.losses)
        distillation = last(run, "distillation")
        epochs = f"{run.epochs[-1]:.1f}" if len(run.epochs) and run.steps_an_epoch else "-"
        rows.append([
            run.label,
            run.state(),
            network(options) or "as pretrained" if options else "-",
            os.path.basename(str(options.get("teacher") or "")) or "none",
            f"{epochs} of {options.get('epochs', '?')}",
            shown(last(run, "loss")),
            shown(distillation / own if distillation and own else None),
            shown(last(run, "accuracy"), 1, " %"),
            shown(history.knn[-1]["knn"] if history.knn else None, 1, " %"),
            shown(float(np.nanmedian(run.column("images_per_s"))) if len(took) else None, 0),
            span(float(np.nansum(took))) if len(took) else "-",
            str(len(history.warnings)),
        ])  # fmt: skip
    return Table(head, rows, range(4, len(head)))


def linear_results(runs: Sequence[Shown]) -> Table | None:
    """The best accuracy of each linear run, with the run whose features it tells of; the best first."""
    classified = [run for run in runs if run.history.kind == "linear" and run.history.validation]
    if not classified:
        return None
    rows = []
    for run in sorted(
        classified, key=lambda run: -max(record["val_top1"] for record in run.history.validation)
    ):
        best = max(run.history.validation, key=lambda record: record["val_top1"])
        source = pretraining(run, runs)
        knn = source.history.knn if source else []
        path = str(run.history.options.get("pretrained", "not known"))
        rows.append([
            run.label,
            source.label if source else path or "none: random weights",
            network((source or run).history.options) or "-",
            shown(knn[-1]["knn"] if knn else None, 1, " %"),
            shown(best["val_top1"], 2, " %"),
            shown(best.get("val_top5"), 2, " %"),
            f"{best['epoch'] + 1:.0f} of {run.history.options.get('epochs', '?')}",
            shown(best.get("val_images"), 0),
        ])  # fmt: skip
    head = [
        "linear run",
        "features of",
        "network",
        "k-NN top-1",
        "linear top-1",
        "top-5",
        "best epoch",
        "images",
    ]
    return Table(head, rows, range(3, len(head)))


def pretraining(run: Shown, runs: Sequence[Shown]) -> Shown | None:
    """The run in whose folder a linear run's --pretrained lies; by the folder's name where runs have been moved."""
    folder = Path(str(run.history.options.get("pretrained") or "/")).parent
    others = [other for other in runs if other.history.kind == "train"]
    same = [other for other in others if other.history.folder.resolve() == folder.resolve()]
    namesakes = [other for other in others if other.history.name == folder.name]
    return same[0] if same else namesakes[0] if len(namesakes) == 1 else None


def options_of(runs: Sequence[Shown], differing: bool) -> Table | None:
    """The options of runs of one kind: those that differ, or all."""
    told = [run for run in runs if run.history.options]
    # What runs had before there was an option is its default, but for shares: their factor was the one they were given.
    usual = {
        "train": dataclasses.asdict(Config()) | {"loss_share": 0.0},
        "linear": dataclasses.asdict(LinearConfig()),
    }
    options = [usual[run.history.kind] | run.history.options for run in told]
    names = [
        name for name in dict.fromkeys(itertools.chain(*options)) if name not in WITHOUT_EFFECT
    ]
    rows = [[name, *(written(some.get(name)) for some in options)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1 or not differing]
    return (
        Table(["option", *(run.label for run in told)], rows)
        if told and (len(told) > 1 or not differing)
        else None
    )


def written(value: Any) -> str:
    """An option's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value in ("", None) else str(value)


def checkpoints(runs: Sequence[Shown], place: Path, now: float) -> list[Checkpoint]:
    """The checkpoints of all runs, for a report in the folder `place`; the newest of each run first."""
    found = []
    for run in runs:
        folder = run.history.folder
        for path in [
            *(best for best in [folder / "best.pth.tar"] if best.exists()),
            *reversed(run.history.checkpoints),
        ]:
            try:
                status = path.stat()
            except OSError:  # a run that goes on has removed it
                continue
            link = quote(
                os.fsencode(
                    os.path.relpath(path.resolve().parent, place.resolve()) + "/" + path.name
                )
            )
            found.append(
                Checkpoint(
                    run.label,
                    path.name,
                    link,
                    f"{status.st_size / 1e6:.1f} MB",
                    f"{span(now - status.st_mtime)} ago",
                )
            )
    return found


def warnings(runs: Sequence[Shown]) -> dict[str, list[str]]:
    """Return what the runs warn of, and the damaged files of their folders: {label: lines}, the same line once."""
    found = {}
    for run in runs:
        counted = Counter(run.history.warnings)
        lines = [
            text + (f" ({times} times)" if times > 1 else "") for text, times in counted.items()
        ]
        if len(lines) > MOST_WARNINGS:
            lines = [
                *lines[:MOST_WARNINGS],
                f"and {len(lines) - MOST_WARNINGS} more in {run.history.folder / 'log.txt'}",
            ]
        if run.history.damaged:
            lines.append(
                f"damaged: {run.history.damaged} lines of metrics.jsonl cannot be read, and are left out"
            )
        if not run.history.options:
            lines.append("damaged or missing: config.yaml tells no options")
        if lines:
            found[run.label] = lines
    return found
