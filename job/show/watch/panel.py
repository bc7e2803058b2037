"""A run's progress in lines of text, for a terminal of any width."""

import bisect
import itertools
import math
import os
import textwrap
import time
import unicodedata
from pathlib import Path
from typing import NamedTuple

from job.metrics.schema import ratio
from job.show.read.discover import JobLog
from job.show.read.history import losses_of, network
from job.show.watch.state import Progress
from job.text import printable


class Marks(NamedTuple):
    """Characters of the panel: heights of a curve, a bar's full and empty cell, cut text."""

    heights: str
    bar: str
    more: str


UNICODE, ASCII = Marks("▁▂▃▄▅▆▇█", "█░", "…"), Marks(".:-=+*#%", "#.", "...")
LABEL = 13  # characters before the text
CENTURY = 3.2e9  # s; a longer time left is not shown
STATES = {
    "done": "done",
    "stopped": "stopped by a signal; --resume auto resumes it",
    "error": "ended with an error",
    "running": "running",
    "starting": "starting: waits for its first step",
}


def sparkline(values: list[float], marks: str) -> str:
    """A mark for each value, the higher the larger it is; a space for NaN."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (
        (len(marks) - 1) / (high - low) if high - low > 1e-12 * max(abs(low), abs(high)) else 0.0
    )
    return "".join(
        marks[round((value - low) * scale)] if math.isfinite(value) else " " for value in values
    )


def bar(share: float, width: int, marks: str) -> str:
    """A bar of which a share is filled."""
    full = int(share * width)
    return marks[0] * full + marks[1] * (width - full)


def span(seconds: float) -> str:
    """Seconds in words: 42 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def cut(text: str, width: int, marks: Marks) -> str:
    """Text in one line of a terminal, where some marks are two columns wide."""
    text = printable(text)
    ends = list(
        itertools.accumulate(
            2 if unicodedata.east_asian_width(mark) in "FW" else 1 for mark in text
        )
    )
    if not ends or ends[-1] <= width:
        return text
    return text[: bisect.bisect_right(ends, width - len(marks.more))] + marks.more


def heading(path: Path, text: str, width: int) -> str:
    """Return a path and its text. If both are too long for a line, keep the path's end."""
    room = max(20, width - len(text) - 2)
    name = str(path)
    return f"{name if len(name) <= room else '..' + name[2 - room :]}: {text}"


def row(label: str, text: str) -> str:
    """A label and its text."""
    return f"  {label:{LABEL - 2}}{text}"


def rows(label: str, texts: list[str]) -> list[str]:
    """A label and its texts, a row each."""
    return [row(label if at == 0 else "", text) for at, text in enumerate(texts)]


def note(text: str, width: int) -> list[str]:
    """Something to be read to its end, in as many lines as it needs."""
    lines = textwrap.wrap(printable(text), max(20, width - 4), break_on_hyphens=False)
    return [f"  {'!' if at == 0 else ' '} {line}" for at, line in enumerate(lines)]


def brief(run: Progress) -> list[str]:
    """The options in brief: what is trained, and on what."""
    options = run.options
    if "pretrained" in options:
        text = f"linear classifier on {network(options) or 'a network'} of {options['pretrained'] or 'random weights'}"
    else:
        text = network(options) or "options unknown"
        if teacher := options.get("teacher"):
            text += f" from {run.records.teacher or 'a teacher'} ({os.path.basename(str(teacher))})"
        else:
            text += ", no teacher" if options else ""
    parts = [f"batch {options['batch_size']}"] if "batch_size" in options else []
    workers = run.records.start.get("workers", 0)
    parts += [f"{workers} worker{'s' * (workers > 1)}"] if workers else []
    parts += [f"{options['image_size']} pixels"] if "image_size" in options else []
    times = run.records.resumed
    parts += ["resumed once" if times == 1 else f"resumed {times} times"] if times else []
    return [text, ", ".join(parts)] if parts else [text]


def differing(run: Progress, runs: list[Progress]) -> list[str]:
    """The options in which runs of this one's kind differ."""
    every = [
        other.options
        for other in runs
        if ("pretrained" in other.options) == ("pretrained" in run.options)
    ]
    return [
        name
        for name, value in run.options.items()
        if any(options.get(name, value) != value for options in every)
    ]


def state(run: Progress) -> str:
    """The run's state in words."""
    found = run.state()
    return STATES.get(found) or f"no news for {span(run.quiet())}: stopped, or waiting"


def eta(run: Progress) -> str:
    """The time left in words, where the run goes on."""
    left = run.left() if run.state() == "running" else None
    if left is None or not left < CENTURY:
        return ""
    day = "%H:%M" if left < 12 * 3600 else "%a %d %b %H:%M" if left < 300 * 86400 else "%d %b %Y"
    return f"{span(left)} left, until {time.strftime(day, time.localtime(time.time() + left))}"


def where(run: Progress) -> str:
    """Return the run's position in words; without a fraction if the steps of an epoch are unknown."""
    epoch, step, steps = run.place
    of = f", of {run.option('epochs')} epochs" if run.option("epochs") else ""
    if not steps:
        return f"epoch {epoch} step {step}{of}"
    return f"{100 * run.share:.0f} %, epoch {epoch} step {step}/{steps}{of}"


def waiting(path: Path, job: JobLog, width: int) -> list[str]:
    """A job whose run is to come."""
    lines = [
        heading(path, "waits for its first step" if job.tries else "waits for its first try", width)
    ]
    return lines + rows("job", job.describe()) + (note(job.error, width) if job.error else [])


def block(run: Progress, job: JobLog | None, problem: str, width: int, marks: Marks) -> list[str]:
    """All of a run; the first line is its heading."""
    graph = max(10, min(60, width - LABEL - 45))
    records = run.records
    lines = [heading(run.folder, state(run), width), ""]
    lines += rows("run", brief(run)) + (rows("job", job.describe()) if job else [])
    if not records.recent:
        return (
            lines
            + [row("log", run.last_line() or "empty so far")]
            + notes(run, job, problem, width)
        )
    lines += [row("progress", f"{bar(run.share, graph, marks.bar)}  {where(run)}")]
    lines += [row("", eta(run))] if eta(run) else []
    loss = records.loss.columns(graph, run.filled)
    finite = [value for value in loss if math.isfinite(value)]
    text = (
        f"{records.now('loss'):.4g}, highest {max(finite):.4g}, least {min(finite):.4g}"
        if finite
        else "not finite"
    )
    lines += plot("loss", loss, text, graph, marks)
    lines += parts(run)
    for name, shown in (("accuracy", "contrast accuracy"), ("top1", "training top-1")):
        if name in records.recent[-1]:
            lines += plot(
                "accuracy",
                records.accuracy.columns(graph),
                f"{records.now(name):.1f} % {shown}",
                graph,
                marks,
            )
    lines += scores(run, graph, marks) + [row("speed", speed(run))] + matching(run) + features(run)
    return lines + [row("saved", saved(run))] + notes(run, job, problem, width)


def plot(label: str, columns: list[float], text: str, graph: int, marks: Marks) -> list[str]:
    """A sparkline with its label, and what it comes to."""
    return [row(label, f"{sparkline(columns, marks.heights).ljust(graph)}  {text}")]


def parts(run: Progress) -> list[str]:
    """Return the framework's losses and the distillation loss, and their ratio, if there are both."""
    losses = losses_of(run.records.start, run.records.recent[-1])
    means = {name: run.records.now(name) for name in [*losses, "distillation"]}
    if not losses or not means["distillation"] > 0:
        return []
    found = ratio(means, losses)
    shown = " + ".join(f"{name} {value:.4g}" for name, value in means.items())
    return [row("", shown + (f", ratio {found:.2f}" if found else ""))]


def scores(run: Progress, graph: int, marks: Marks) -> list[str]:
    """The k-NN or validation accuracies so far."""
    score = run.records.score
    if "knn" in score:
        text, label = f"{score['knn']:.1f} % after {score['epoch']:.0f} epochs", "k-NN"
    elif score:
        text, label = (
            f"{score['val_top1']:.1f} % top-1 after {score['epoch'] + 1:.0f} epochs",
            "validation",
        )
    else:
        return []
    return plot(
        label,
        run.records.scores.columns(graph),
        f"{text}, best {run.records.best:.1f}",
        graph,
        marks,
    )


def speed(run: Progress) -> str:
    """Images a second, waiting for data, and the age of the last number."""
    records = run.records
    mean = records.count / records.seconds if records.seconds else math.nan
    age = max(0.0, time.time() - run.metrics.changed)
    wait = 100 * records.now("data_wait")
    return f"{records.now('images_per_s'):.4g} images/s, mean {mean:.4g}; data wait {wait:.0f} %; last number {span(age)} ago"


def matching(run: Progress) -> list[str]:
    """Return the last refresh of each distiller: channels changed and cost, a column a stage."""
    records = run.records
    if not records.refresh:
        return []
    took = f", {records.refresh_seconds:.1f} s" if records.refresh_seconds else ""
    lines = [
        row("matching", f"refresh {records.refreshes}, before epoch {records.refreshed}{took}")
    ]
    for distiller, stages in records.refresh.items():
        found = sorted(stages.items())
        epoch = found[0][1]["epoch"]
        earlier = f"  before epoch {epoch}" if epoch != records.refreshed else ""
        changed = " ".join(f"{100 * record['changed']:6.0f} %" for _, record in found)
        cost = " ".join(f"{record.get('cost_after', math.nan):8.3f}" for _, record in found)
        names = " ".join(f"{f'layer{stage}':>8}" for stage, _ in found)
        lines += [row("", f"{distiller:8.8}{names}{earlier}"), row("", f"{'changed':8}{changed}")]
        lines += (
            [row("", f"{'cost':8}{cost}")]
            if any("cost_after" in record for _, record in found)
            else []
        )
    return lines


def features(run: Progress) -> list[str]:
    """The signs of collapse; of the dead channels, the worst stage; of the AUC, the last."""
    signs, score = run.records.signs, run.records.score
    if not signs:
        return []
    dead = max(
        (
            (share, name.removeprefix("dead_"))
            for name, share in signs.items()
            if name.startswith("dead_")
        ),
        default=None,
    )
    text = f"deviation {signs['feature_std']:.2f} of 1"
    text += f", rank {signs['queue_rank']:.1f}" if "queue_rank" in signs else ""
    text += f", AUC {score['knn_auc']:.3f}" if "knn_auc" in score else ""
    return [
        row(
            "features",
            text + (f", dead channels {100 * dead[0]:.0f} % of {dead[1]}" if dead else ""),
        )
    ]


def saved(run: Progress) -> str:
    """The last checkpoint."""
    found = run.checkpoint()
    return f"{found[0]}, {span(found[1])} ago, {found[2] / 1e6:.0f} MB" if found else "nothing yet"


def notes(run: Progress, job: JobLog | None, problem: str, width: int, most: int = 3) -> list[str]:
    """Return the last warnings, hints and errors, each once, and the number of damaged lines."""
    lines = []
    for when, text in list(run.records.warnings.values())[-most:]:
        lines += note(f"{text} ({span(max(0.0, time.time() - when))} ago)", width)
    # The job's log may have rank and node before an error that the run has recorded.
    texts = [text for _, text in run.records.warnings.values() if text.startswith("error: ")]
    recorded = tuple(text.removeprefix("error: ") for text in texts)
    if job and job.error and not job.error.endswith(recorded):
        lines += note(job.error, width)
    if run.records.damaged:
        lines += note(
            f"{run.records.damaged} lines of metrics.jsonl are damaged, and passed over", width
        )
    return lines + (note(problem, width) if problem else [])


def short(
    run: Progress, job: JobLog | None, problem: str, options: list[str], width: int, marks: Marks
) -> list[str]:
    """A run in a few lines, where there are several; the first is its heading. options: those in which they differ."""
    graph = max(10, min(40, width - 48))
    lines = [heading(run.folder, state(run), width)]
    values = [
        f"{name} {'none' if run.options[name] == '' else run.options[name]}" for name in options
    ]
    lines += [f"  {', '.join(values or brief(run))}"]
    lines += [f"  {', '.join(job.describe())}"] if job else []
    if run.records.recent:
        lines += [f"  {bar(run.share, graph, marks.bar)}  {where(run)}"]
        text = f"loss {run.records.now('loss'):.4g}, {run.records.now('images_per_s'):.4g} images/s"
        lines += [
            f"  {sparkline(run.records.loss.columns(graph, run.filled), marks.heights).ljust(graph)}  {text}"
        ]
        lines += [f"  {eta(run)}"] if eta(run) else []
    return lines + notes(run, job, problem, width, 1)
