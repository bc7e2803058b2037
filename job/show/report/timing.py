"""A report's pictures of time and speed."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from job.show.read.history import History
from job.show.read.runs import ReportRun
from job.show.report.curves import names, with_numbers
from job.show.report.style import (
    HATCHES,
    Picture,
    add_legend,
    draw_steps,
    finish,
    new_figure,
    short_label,
)

ACTIVITIES = ("waiting for images", "networks and their gradients", "refreshes", "k-NN")
# Of the activities: light, so that hatches and numbers are readable.
GREYS = ("#d9d9d9", "#8fb4d9", "#e8c08a", "#6f6f6f")


def step_seconds(run: ReportRun) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of each of n steps, (n,), and rank 0's seconds without images, (n,)."""
    return run.step_seconds, run.step_seconds * run.column("data_wait")


def refresh_seconds(history: History) -> float:
    """Return the seconds of all refreshes. Each stage's record has those of all stages."""
    timed = ("measuring", "gathering", "solving")
    refreshes = {(record["epoch"], record["distiller"]): record for record in history.refreshes}
    return sum(record.get(name, 0.0) for record in refreshes.values() for name in timed)


def knn_seconds(history: History) -> float:
    """Return the seconds of all k-NN accuracies."""
    return sum(record.get("knn_seconds", 0.0) for record in history.knn)


def step_milliseconds(run: ReportRun) -> np.ndarray:
    """Return the median ms of a step's first two activities, (2,)."""
    seconds, waited = step_seconds(run)
    return 1000 * np.array([np.nanmedian(waited), np.nanmedian(seconds - waited)])


def run_percent(run: ReportRun) -> np.ndarray:
    """Return the percent of a run's time for each activity, (4,)."""
    seconds, waited = step_seconds(run)
    of_steps = [np.nansum(waited), np.nansum(seconds - waited)]
    total = np.array([*of_steps, refresh_seconds(run.history), knn_seconds(run.history)])
    return 100 * total / total.sum()


def draw_bars(axes: Axes, rows: np.ndarray) -> None:
    """Draw a bar for each of n runs, with a part for each of a activities. rows: widths, (n, a)."""
    lefts = np.zeros(len(rows))  # (n,)
    for activity, grey, hatch, widths in zip(ACTIVITIES, GREYS, HATCHES, rows.T, strict=False):
        axes.barh(
            range(len(rows)),
            widths,
            left=lefts,
            color=grey,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            label=activity,
        )
        for row, (left, width) in enumerate(zip(lefts, widths, strict=True)):
            if width > 0.12 * rows.sum(1).max():
                axes.text(
                    left + width / 2,
                    row,
                    f"{width:.0f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    bbox=dict(facecolor="white", edgecolor="none", pad=1),
                )
        lefts += widths
    axes.grid(axis="y", visible=False)


def breakdown(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the time of a step and of a run by activity."""
    if not (
        shown := [
            run for run in with_numbers(runs, "images_per_s") if run.option("batch_size", 0) > 0
        ]
    ):
        return None
    figure = new_figure(1.4 + 0.45 * len(shown))
    step_axes, run_axes = figure.subplots(1, 2, sharey=True)
    draw_bars(step_axes, np.stack([step_milliseconds(run) for run in shown]))
    draw_bars(run_axes, np.stack([run_percent(run) for run in shown]))
    step_axes.set(
        title="a step (median), ms",
        yticks=range(len(shown)),
        yticklabels=[short_label(run) for run in shown],
    )
    step_axes.invert_yaxis()
    run_axes.set(title="the run, % of its time")
    add_legend(figure)
    reading = (
        "Left: the time of a step, and in it the time that rank 0 waited for images. Right: the "
        "time of the run, without its start. Normal: networks and gradients need nearly all. "
        "They include logging, saving within epochs and waiting for slower workers. Refreshes "
        "and k-NN need a few percent of a long run. If waiting for images needs more than 10 %, "
        "use more loader processes (--workers), pack the data (job.pack), or augment on "
        "the GPU (--augment-on device)."
    )
    return finish(
        figure,
        "time",
        "Where the time goes",
        reading,
        f"Time of a step and of the run by activity, of {names(shown)}",
    )


def speed(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw images per second over the epochs."""
    if not (shown := with_numbers(runs, "images_per_s")):
        return None
    figure = new_figure(3.0)
    axes = figure.subplots()
    for run in shown:
        draw_steps(axes, run, run.column("images_per_s"))
    axes.set(xlabel="epochs", ylabel="images a second, all workers")
    axes.set_ylim(bottom=0)
    add_legend(figure)
    reading = (
        "The images that all workers together train on in a second. Normal: level. Periodic dips "
        "are checkpoints, and the first step is slow. A lasting fall has a cause outside the "
        "run: another program on the machine, a slow disk, or a hot processor."
    )
    return finish(
        figure, "speed", "Speed", reading, f"Images a second over the epochs of {names(shown)}"
    )
