"""Describe a run's progress in lines of text, for a terminal of any width."""

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
    """Characters of the panel: heights of a curve, a bar's full and empty cell, a cut."""

    heights: str
    bar: str
    more: str


UNICODE, ASCII = Marks("▁▂▃▄▅▆▇█", "█░", "…"), Marks(".:-=+*#%", "#.", "...")
LABEL = 13  # columns before the text
CENTURY = 3.2e9  # s; a longer time left is omitted
STATES = {
    "done": "done",
    "stopped": "stopped by a signal; --resume auto resumes it",
    "error": "ended with an error",
    "running": "running",
    "starting": "starting: waits for its first step",
}


def sparkline(values: list[float], marks: str) -> str:
    """Return a mark for each value, higher for larger ones, and a space for NaN."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    half = high / 2 - low / 2  # half the range, because the range itself can overflow
    scale = (len(marks) - 1) * (half > 5e-13 * max(abs(low), abs(high)))
    return "".join(
        marks[round((value / 2 - low / 2) / (half or 1.0) * scale)] if math.isfinite(value) else " "
        for value in values
    )


def bar(fraction: float, width: int, marks: str) -> str:
    """Return a bar that is filled to a fraction."""
    full = int(fraction * width)
    return marks[0] * full + marks[1] * (width - full)


def span(seconds: float) -> str:
    """Return seconds as text: 42 s, 12 min, 3 h 5 min, 2 d 4 h."""
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
    """Return text cut to the columns of a terminal, where some characters have two."""
    text = printable(text)
    ends = list(
        itertools.accumulate(
            2 if unicodedata.east_asian_width(character) in "FW" else 1 for character in text
        )
    )
    if not ends or ends[-1] <= width:
        return text
    return text[: bisect.bisect_right(ends, width - len(marks.more))] + marks.more


def heading(path: Path, text: str, width: int) -> str:
    """Return a path and its text, with only the path's end if a line is too short."""
    room = max(20, width - len(text) - 2)
    name = str(path)
    return f"{name if len(name) <= room else '..' + name[2 - room :]}: {text}"


def row(label: str, text: str) -> str:
    """Return a label and its text in a line."""
    return f"  {label:{LABEL - 2}}{text}"


def rows(label: str, texts: list[str]) -> list[str]:
    """Return a label and its texts, one line for each text."""
    return [row(label if number == 0 else "", text) for number, text in enumerate(texts)]


def note(text: str, width: int) -> list[str]:
    """Return text that must not be cut, in as many lines as it needs."""
    lines = textwrap.wrap(printable(text), max(20, width - 4), break_on_hyphens=False)
    return [f"  {'!' if number == 0 else ' '} {line}" for number, line in enumerate(lines)]


def brief(run: Progress) -> list[str]:
    """Return the main options: networks, batch, workers, image size, and the resumes."""
    options = run.options
    if "pretrained" in options:
        features_of = options["pretrained"] or "random weights"
        text = f"linear classifier on {network(options) or 'a network'} of {features_of}"
    else:
        text = network(options) or "options unknown"
        if teacher := options.get("teacher"):
            text += f" from {run.records.teacher or 'a teacher'} ({os.path.basename(str(teacher))})"
        else:
            text += ", no teacher" if options else ""
    details = [f"batch {options['batch_size']}"] if "batch_size" in options else []
    workers = run.records.start.get("workers", 0)
    details += [f"{workers} worker{'s' * (workers > 1)}"] if workers else []
    details += [f"{options['image_size']} pixels"] if "image_size" in options else []
    times = run.records.resumed
    details += ["resumed once" if times == 1 else f"resumed {times} times"] if times else []
    return [text, ", ".join(details)] if details else [text]


def differing(run: Progress, runs: list[Progress]) -> list[str]:
    """Return the names of options that differ between this run and others of its kind."""
    comparable = [
        other.options
        for other in runs
        if ("pretrained" in other.options) == ("pretrained" in run.options)
    ]
    return [
        name
        for name, value in run.options.items()
        if any(options.get(name, value) != value for options in comparable)
    ]


def describe_state(run: Progress) -> str:
    """Return the run's state as text."""
    return STATES.get(run.state()) or f"no new record for {span(run.quiet())}: stopped, or waiting"


def eta(run: Progress) -> str:
    """Return the time left as text, or "" if the run is not running."""
    left = run.left() if run.state() == "running" else None
    if left is None or not left < CENTURY:
        return ""
    day = "%H:%M" if left < 12 * 3600 else "%a %d %b %H:%M" if left < 300 * 86400 else "%d %b %Y"
    return f"{span(left)} left, until {time.strftime(day, time.localtime(time.time() + left))}"


def describe_position(run: Progress) -> str:
    """Return the run's position as text, without a percentage if it is unknown."""
    epoch, step, steps = run.position
    of = f", of {run.option('epochs')} epochs" if run.option("epochs") else ""
    if not steps:
        return f"epoch {epoch} step {step}{of}"
    return f"{100 * run.fraction:.0f} %, epoch {epoch} step {step}/{steps}{of}"


def waiting(path: Path, job: JobLog, width: int) -> list[str]:
    """Return the lines of a job whose run has not started."""
    lines = [
        heading(path, "waits for its first step" if job.tries else "waits for its first try", width)
    ]
    return lines + rows("job", job.describe()) + (note(job.error, width) if job.error else [])


def block(run: Progress, job: JobLog | None, problem: str, width: int, marks: Marks) -> list[str]:
    """Return all lines of a run. The first is its heading."""
    graph = max(10, min(60, width - LABEL - 45))
    records = run.records
    lines = [heading(run.folder, describe_state(run), width), ""]
    lines += rows("run", brief(run)) + (rows("job", job.describe()) if job else [])
    if not records.recent:
        return (
            lines
            + [row("log", run.last_line() or "empty so far")]
            + notes(run, job, problem, width)
        )
    done = bar(run.fraction, graph, marks.bar)
    lines += [row("progress", f"{done}  {describe_position(run)}")]
    lines += [row("", eta(run))] if eta(run) else []
    loss = records.loss.columns(graph, run.filled)
    finite = [value for value in loss if math.isfinite(value)]
    text = (
        f"{records.recent_mean('loss'):.4g}, highest {max(finite):.4g}, lowest {min(finite):.4g}"
        if finite
        else "not finite"
    )
    lines += plot("loss", loss, text, graph, marks)
    lines += losses(run)
    for name, title in (("accuracy", "contrast accuracy"), ("top1", "training top-1")):
        if name in records.recent[-1]:
            lines += plot(
                "accuracy",
                records.accuracy.columns(graph),
                f"{records.recent_mean(name):.1f} % {title}",
                graph,
                marks,
            )
    lines += scores(run, graph, marks) + [row("speed", speed(run))] + matching(run) + features(run)
    return lines + [row("saved", saved(run))] + notes(run, job, problem, width)


def plot(label: str, columns: list[float], text: str, graph: int, marks: Marks) -> list[str]:
    """Return a labelled sparkline and its text."""
    return [row(label, f"{sparkline(columns, marks.heights).ljust(graph)}  {text}")]


def losses(run: Progress) -> list[str]:
    """Return the framework's losses, the distillation loss and their ratio, if there are both."""
    names = losses_of(run.records.start, run.records.recent[-1])
    means = {name: run.records.recent_mean(name) for name in [*names, "distillation"]}
    if not names or not means["distillation"] > 0:
        return []
    value = ratio(means, names)
    text = " + ".join(f"{name} {mean:.4g}" for name, mean in means.items())
    return [row("", text + (f", ratio {value:.2f}" if value else ""))]


def scores(run: Progress, graph: int, marks: Marks) -> list[str]:
    """Return the k-NN or validation accuracies."""
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
    """Return the images a second, the waiting for data, and the age of the last record."""
    records = run.records
    mean = records.count / records.seconds if records.seconds else math.nan
    age = max(0.0, time.time() - run.metrics.changed)
    wait = 100 * records.recent_mean("data_wait")
    return (
        f"{records.recent_mean('images_per_s'):.4g} images/s, mean {mean:.4g}; "
        f"data wait {wait:.0f} %; last record {span(age)} ago"
    )


def matching(run: Progress) -> list[str]:
    """Return the last refresh of each distiller: changed channels and cost of each stage."""
    records = run.records
    if not records.refresh:
        return []
    seconds = f", {records.refresh_seconds:.1f} s" if records.refresh_seconds else ""
    lines = [
        row("matching", f"refresh {records.refreshes}, before epoch {records.refreshed}{seconds}")
    ]
    for distiller, stages in records.refresh.items():
        ordered = sorted(stages.items())
        epoch = ordered[0][1]["epoch"]
        earlier = f"  before epoch {epoch}" if epoch != records.refreshed else ""
        changed = " ".join(f"{100 * record['changed']:6.0f} %" for _, record in ordered)
        cost = " ".join(f"{record.get('cost_after', math.nan):8.3f}" for _, record in ordered)
        names = " ".join(f"{f'layer{stage}':>8}" for stage, _ in ordered)
        lines += [row("", f"{distiller:8.8}{names}{earlier}"), row("", f"{'changed':8}{changed}")]
        lines += (
            [row("", f"{'cost':8}{cost}")]
            if any("cost_after" in record for _, record in ordered)
            else []
        )
    return lines


def features(run: Progress) -> list[str]:
    """Return the signs of collapse: dead channels of the worst stage, the last AUC."""
    signs, score = run.records.signs, run.records.score
    if not signs:
        return []
    dead = max(
        (
            (fraction, name.removeprefix("dead_"))
            for name, fraction in signs.items()
            if name.startswith("dead_")
        ),
        default=None,
    )
    text = f"spread {signs['feature_std']:.2f}"
    text += f", rank {signs['queue_rank']:.1f}" if "queue_rank" in signs else ""
    text += f", AUC {score['knn_auc']:.3f}" if "knn_auc" in score else ""
    return [
        row(
            "features",
            text + (f", dead channels {100 * dead[0]:.0f} % of {dead[1]}" if dead else ""),
        )
    ]


def saved(run: Progress) -> str:
    """Return the last checkpoint as text."""
    if not (checkpoint := run.checkpoint()):
        return "no checkpoint yet"
    name, age, size = checkpoint
    return f"{name}, {span(age)} ago, {size / 1e6:.0f} MB"


def notes(run: Progress, job: JobLog | None, problem: str, width: int, most: int = 3) -> list[str]:
    """Return the last warnings, hints and errors, each once, and the number of damaged lines."""
    lines = []
    for when, text in list(run.records.warnings.values())[-most:]:
        lines += note(f"{text} ({span(max(0.0, time.time() - when))} ago)", width)
    # The job's log may show a recorded error with its rank and node before it.
    texts = [text for _, text in run.records.warnings.values() if text.startswith("error: ")]
    recorded = tuple(text.removeprefix("error: ") for text in texts)
    if job and job.error and not job.error.endswith(recorded):
        lines += note(job.error, width)
    if run.records.damaged:
        lines += note(f"skipped {run.records.damaged} damaged lines of metrics.jsonl", width)
    return lines + (note(problem, width) if problem else [])


def short(
    run: Progress, job: JobLog | None, problem: str, options: list[str], width: int, marks: Marks
) -> list[str]:
    """Return a few lines for one of several runs. The first is its heading.

    options: names of the options that differ.
    """
    graph = max(10, min(40, width - 48))
    lines = [heading(run.folder, describe_state(run), width)]
    values = [
        f"{name} {'none' if run.options[name] == '' else run.options[name]}" for name in options
    ]
    lines += [f"  {', '.join(values or brief(run))}"]
    lines += [f"  {', '.join(job.describe())}"] if job else []
    if run.records.recent:
        lines += [f"  {bar(run.fraction, graph, marks.bar)}  {describe_position(run)}"]
        loss, images = (run.records.recent_mean(name) for name in ("loss", "images_per_s"))
        curve = sparkline(run.records.loss.columns(graph, run.filled), marks.heights)
        lines += [f"  {curve.ljust(graph)}  loss {loss:.4g}, {images:.4g} images/s"]
        lines += [f"  {eta(run)}"] if eta(run) else []
    return lines + notes(run, job, problem, width, 1)
