"""A report's tables: progress, linear results, options, checkpoints and warnings."""

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
from job.show.read.runs import ReportRun
from job.show.watch.panel import span
from job.show.watch.state import RECENT

MOST_WARNINGS = 20  # of a run


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text below a head. numbers: the right-aligned columns."""

    head: list[str]
    rows: list[list[str]]
    numbers: range = range(0)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's file. link: its address relative to the report's folder."""

    run: str
    name: str
    link: str
    size: str
    age: str


def shown(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Return a number as text, or a dash if it is missing or not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}{unit}"


def last(run: ReportRun, name: str) -> float | None:
    """Return the mean of a number over a run's last steps, or None."""
    values = run.column(name)
    return float(smooth(values, max(1, min(RECENT, len(values) // 4)))[-1]) if len(values) else None


def overview(runs: Sequence[ReportRun]) -> Table:
    """Return the state, position and recent numbers of each run."""
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
        seconds = run.step_seconds
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
            shown(float(np.nanmedian(run.column("images_per_s"))) if len(seconds) else None, 0),
            span(float(np.nansum(seconds))) if len(seconds) else "-",
            str(len(history.warnings)),
        ])  # fmt: skip
    return Table(head, rows, range(4, len(head)))


def linear_results(runs: Sequence[ReportRun]) -> Table | None:
    """Return the best accuracy of each linear run and the run of its features, best first."""
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
        path = str(run.history.options.get("pretrained", "unknown"))
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


def pretraining(run: ReportRun, runs: Sequence[ReportRun]) -> ReportRun | None:
    """Return the run whose folder holds a linear run's --pretrained, or None.

    If runs have moved, a unique folder name decides.
    """
    folder = Path(str(run.history.options.get("pretrained") or "/")).parent
    others = [other for other in runs if other.history.kind == "train"]
    same = [other for other in others if other.history.folder.resolve() == folder.resolve()]
    namesakes = [other for other in others if other.history.name == folder.name]
    return same[0] if same else namesakes[0] if len(namesakes) == 1 else None


def options_of(runs: Sequence[ReportRun], differing: bool) -> Table | None:
    """Return the options of runs of one kind: all, or those that differ. None: no such table."""
    known = [run for run in runs if run.history.options]
    # A run that is older than an option had its default, except for --loss-share: it had a factor.
    defaults = {
        "train": dataclasses.asdict(Config()) | {"loss_share": 0.0},
        "linear": dataclasses.asdict(LinearConfig()),
    }
    options = [defaults[run.history.kind] | run.history.options for run in known]
    names = [
        name for name in dict.fromkeys(itertools.chain(*options)) if name not in WITHOUT_EFFECT
    ]
    rows = [[name, *(as_text(values.get(name)) for values in options)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1 or not differing]
    return (
        Table(["option", *(run.label for run in known)], rows)
        if known and (len(known) > 1 or not differing)
        else None
    )


def as_text(value: Any) -> str:
    """Return an option's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value in ("", None) else str(value)


def checkpoints(runs: Sequence[ReportRun], folder: Path, now: float) -> list[Checkpoint]:
    """Return the checkpoints of all runs, newest first. folder: the report's."""
    listed = []
    for run in runs:
        best = run.history.folder / "best.pth.tar"
        for path in [*[best] * best.exists(), *reversed(run.history.checkpoints)]:
            try:
                status = path.stat()
            except OSError:  # the running program has removed it
                continue
            relative = os.path.relpath(path.resolve().parent, folder.resolve()) + "/" + path.name
            link = quote(os.fsencode(relative))
            listed.append(
                Checkpoint(
                    run.label,
                    path.name,
                    link,
                    f"{status.st_size / 1e6:.1f} MB",
                    f"{span(now - status.st_mtime)} ago",
                )
            )
    return listed


def warnings(runs: Sequence[ReportRun]) -> dict[str, list[str]]:
    """Return {label: lines}: each run's warnings without repetitions, and its damaged files."""
    lines_of = {}
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
            lines.append(f"damaged: {run.history.damaged} lines of metrics.jsonl; they are skipped")
        if not run.history.options:
            lines.append("damaged or missing: config.yaml; the options are unknown")
        if lines:
            lines_of[run.label] = lines
    return lines_of
