"""A run's progress in lines of text, for a terminal of any width."""

import math
import os
import textwrap
import time

from job.show.places import JobLog
from job.show.progress import Progress

UNICODE, ASCII = ("▁▂▃▄▅▆▇█", "█░"), (".:-=+*#%", "#.")
LABEL = 13  # characters before the text
STATES = {
    "done": "done",
    "stopped": "stopped by a signal; --resume auto goes on",
    "error": "ended with an error",
    "running": "running",
    "starting": "starting: waits for its first step",
}


def sparkline(values: list[float], marks: str) -> str:
    """A mark for each value, the higher the larger it is; a space for NaN."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(marks) - 1) / (high - low) if high - low > 1e-12 * max(abs(low), abs(high)) else 0.0
    return "".join(marks[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def bar(share: float, width: int, marks: str) -> str:
    """A bar of which a share is filled."""
    full = int(share * width)
    return marks[0] * full + marks[1] * (width - full)


def span(seconds: float) -> str:
    """Seconds in words: 42 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def clean(text: str) -> str:
    """Text without what would steer a terminal."""
    return "".join(mark if mark.isprintable() else "?" for mark in text)


def row(label: str, text: str, width: int) -> list[str]:
    """A label and its text, in as many lines as it needs."""
    lines = textwrap.wrap(clean(text), max(20, width - LABEL), break_on_hyphens=False)
    return [f"  {label if at == 0 else '':{LABEL - 2}}{line}" for at, line in enumerate(lines)]


def brief(run: Progress) -> str:
    """The options in brief."""
    options = run.options
    if "pretrained" in options:
        text = f"linear classifier on {options.get('arch') or 'a network'} of {options['pretrained'] or 'random weights'}"
    else:
        text = str(options.get("arch", "options not known"))
        if teacher := options.get("teacher"):
            text += f" from {run.log.teacher or 'a teacher'} ({os.path.basename(str(teacher))})"
        else:
            text += ", no teacher" if options else ""
    workers = f" over {run.log.workers} worker{'s' * (run.log.workers > 1)}" if run.log.workers else ""
    text += f", batch {options['batch_size']}{workers}" if "batch_size" in options else workers
    text += f", {options['image_size']} pixels" if "image_size" in options else ""
    return text + (f"; resumed {run.log.tries - 1} times" if run.log.tries > 1 else "")


def state(run: Progress) -> str:
    """The run's state in words."""
    found = run.state()
    return STATES.get(found) or f"no news for {span(run.quiet())}: stopped, or waiting"


def eta(run: Progress) -> str:
    """The time left in words, where the run goes on."""
    left = run.left() if run.state() == "running" else None
    if left is None:
        return ""
    day = "%H:%M" if left < 12 * 3600 else "%a %d %b %H:%M"
    return f"{span(left)} left, until {time.strftime(day, time.localtime(time.time() + left))}"


def where(run: Progress) -> str:
    """How far the run is, counted as its log counts."""
    epoch, step, steps = run.place
    of = f", of {run.option('epochs')} epochs" if run.option("epochs") else ""
    return f"{100 * run.share:.0f} %, epoch {epoch} step {step}/{steps or '?'}{of}"


def block(run: Progress, job: JobLog | None, width: int, marks: tuple[str, str] = UNICODE) -> list[str]:
    """All of a run; the first line is its heading."""
    graph = max(10, min(60, width - LABEL - 40))
    steps = run.steps
    lines = [clean(f"{run.folder}: {state(run)}"), ""]
    lines += row("run", brief(run), width)
    lines += row("job", job.describe(), width) if job else []
    if not steps.recent:
        return lines + row("log", run.log.last[1] or "empty so far", width) + notes(run, job, width)
    lines += row("progress", f"{bar(run.share, graph, marks[1])}  {where(run)}", width)
    lines += row("", eta(run), width)
    loss = steps.loss.means()
    text = f"{steps.now('loss'):.4g}, first {steps.first['loss']:.4g}, least {min(loss):.4g}" if loss else "not finite"
    lines += plot("loss", steps.loss.columns(graph), text, graph, width, marks)
    if steps.now("distillation") > 0:
        parts = steps.now("contrastive"), steps.now("distillation")
        ratio = f", ratio {parts[1] / parts[0]:.2f}" if parts[0] else ""
        lines += row("", f"contrastive {parts[0]:.4g} + distillation {parts[1]:.4g}{ratio}", width)
    accuracy = "contrast accuracy" if "accuracy" in steps.recent[-1] else "training top-1"
    value = steps.now("accuracy") if "accuracy" in steps.recent[-1] else steps.now("top1")
    lines += plot("accuracy", steps.accuracy.columns(graph), f"{value:.1f} % {accuracy}", graph, width, marks)
    lines += scores(run, graph, width, marks) + speed(run, width) + matching(run, width)
    if signs := steps.signs:
        dead = (
            max((signs[name], name.removeprefix("dead_")) for name in signs if name.startswith("dead_"))
            if len(signs) > 5
            else None
        )
        text = f"deviation {signs['feature_std']:.2f} of 1, rank of the queue {signs.get('queue_rank', math.nan):.1f}"
        lines += row("features", text + (f", dead channels {100 * dead[0]:.0f} % of {dead[1]}" if dead else ""), width)
    return lines + saved(run, width) + notes(run, job, width)


def plot(label: str, columns: list[float], text: str, graph: int, width: int, marks: tuple[str, str]) -> list[str]:
    """A sparkline with its label, and what it comes to."""
    line = sparkline(columns, marks[0]).ljust(graph)
    return [f"  {label:{LABEL - 2}}{line}  {text}"[:width]]


def scores(run: Progress, graph: int, width: int, marks: tuple[str, str]) -> list[str]:
    """The k-NN or validation accuracies so far."""
    score = run.steps.score
    if "knn" in score:
        text, label = f"{score['knn']:.1f} % after {score.get('epoch', 0):.0f} epochs", "k-NN"
    elif score:
        text, label = f"{score['val_top1']:.1f} % top-1 after epoch {score.get('epoch', 0):.0f}", "validation"
    else:
        return []
    return plot(label, run.steps.scores.columns(graph), f"{text}, best {run.steps.best:.1f}", graph, width, marks)


def speed(run: Progress, width: int) -> list[str]:
    """Images a second, waiting for data, and the age of the last number."""
    steps = run.steps
    mean = steps.count / steps.seconds if steps.seconds else math.nan
    age = max(0.0, time.time() - run.metrics.changed)
    wait = 100 * steps.now("data_wait")
    text = f"{steps.now('images_per_s'):.4g} images/s, mean {mean:.4g}; data wait {wait:.0f} %; last number {span(age)} ago"
    return row("speed", text, width)


def matching(run: Progress, width: int) -> list[str]:
    """The last refresh: channels changed and cost, a column a stage."""
    found = sorted(run.steps.refresh.items())
    if not found:
        return []
    epoch = found[0][1].get("epoch", 0)
    stages = ", ".join(f"layer{stage}" for stage, _ in found)
    took = f", {run.log.refresh:.1f} s" if run.log.refresh else ""
    lines = row("matching", f"refresh {run.steps.refreshes}, before epoch {epoch:.0f}{took}; {stages}:", width)
    changed = " ".join(f"{100 * record.get('changed', math.nan):6.0f} %" for _, record in found)
    cost = " ".join(f"{record.get('cost_after', math.nan):8.3f}" for _, record in found)
    return lines + [f"{'':{LABEL}}{'changed':8}{changed}", f"{'':{LABEL}}{'cost':8}{cost}"]


def saved(run: Progress, width: int) -> list[str]:
    """The last checkpoint."""
    found = run.checkpoint()
    return row("saved", f"{found[0]}, {span(found[1])} ago, {found[2] / 1e6:.0f} MB" if found else "nothing yet", width)


def notes(run: Progress, job: JobLog | None, width: int, most: int = 3) -> list[str]:
    """The last warnings and errors, and what is damaged."""
    lines = []
    for when, text in list(run.log.warnings.values())[-most:]:
        lines += row("!", f"{text} ({span(run.ago(when))} ago)", width)
    if job and job.error and not any(text == job.error for _, text in run.log.warnings.values()):
        lines += row("!", job.error, width)
    if run.steps.damaged:
        lines += row("!", f"{run.steps.damaged} lines of metrics.jsonl are damaged, and passed over", width)
    return lines


def short(run: Progress, job: JobLog | None, width: int, marks: tuple[str, str] = UNICODE) -> list[str]:
    """A run in a few lines, where there are several; the first is its heading."""
    graph = max(10, min(40, width - 48))
    lines = [clean(f"{run.folder}: {state(run)}")]
    lines += [f"  {line.strip()}" for line in row("", brief(run), width)]
    if job:
        lines += [f"  {line.strip()}" for line in row("", f"job: {job.describe()}", width)]
    if run.steps.recent:
        lines += [f"  {bar(run.share, graph, marks[1])}  {where(run)}"[:width]]
        text = f"loss {run.steps.now('loss'):.4g}, {run.steps.now('images_per_s'):.4g} images/s"
        lines += [f"  {sparkline(run.steps.loss.columns(graph), marks[0]).ljust(graph)}  {text}"[:width]]
        lines += [f"  {eta(run)}"] if eta(run) else []
    return lines + [f"  ! {line.strip()}".replace("! !", "!") for line in notes(run, job, width, 1)]
