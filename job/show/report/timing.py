"""A report's pictures of how the time was spent."""

from collections.abc import Sequence

import numpy as np

from job.show.read.history import History
from job.show.read.runs import Shown
from job.show.report.curves import names, with_numbers
from job.show.report.style import (
    HATCHES,
    Picture,
    draw_steps,
    finish,
    name_of,
    name_runs,
    new_figure,
)

GREYS = (
    "#d9d9d9",
    "#8fb4d9",
    "#e8c08a",
    "#6f6f6f",
)  # of the parts: light, so that hatches and figures can be read
PARTS = ("waiting for images", "networks and their gradients", "refreshes", "k-NN")


def step_seconds(run: Shown) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of each step, (n,), and those that rank 0 waited for images, (n,)."""
    return run.step_seconds, run.step_seconds * run.column("data_wait")


def refresh_seconds(history: History) -> float:
    """Return the seconds of all refreshes; the record of each stage has those of all stages."""
    timed = ("measuring", "gathering", "solving")
    refreshes = {(record["epoch"], record["distiller"]): record for record in history.refreshes}
    return sum(record.get(name, 0.0) for record in refreshes.values() for name in timed)


def knn_seconds(history: History) -> float:
    """Return the seconds of all k-NN accuracies."""
    return sum(record.get("knn_seconds", 0.0) for record in history.knn)


def breakdown(runs: Sequence[Shown]) -> Picture | None:
    """Draw how a step's time and a run's time were spent."""
    if not (
        shown := [
            run for run in with_numbers(runs, "images_per_s") if run.option("batch_size", 0) > 0
        ]
    ):
        return None
    figure = new_figure(1.4 + 0.45 * len(shown))
    a_step, in_all = figure.subplots(1, 2, sharey=True)
    steps, wholes = [], []
    for run in shown:
        took, waited = step_seconds(run)
        steps.append([1000 * np.nanmedian(waited), 1000 * np.nanmedian(took - waited)])
        whole = np.array(
            [
                np.nansum(waited),
                np.nansum(took - waited),
                refresh_seconds(run.history),
                knn_seconds(run.history),
            ]
        )
        wholes.append(100 * whole / whole.sum())
    for axes, rows in ((a_step, np.array(steps)), (in_all, np.array(wholes))):
        lefts = np.zeros(len(shown))
        for part, colour, hatch, widths in zip(PARTS, GREYS, HATCHES, rows.T, strict=False):
            axes.barh(
                range(len(shown)),
                widths,
                left=lefts,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.6,
                label=part,
            )
            for place, (left, width) in enumerate(zip(lefts, widths, strict=True)):
                if width > 0.12 * rows.sum(1).max():
                    box = dict(facecolor="white", edgecolor="none", pad=1)
                    axes.text(
                        left + width / 2,
                        place,
                        f"{width:.0f}",
                        ha="center",
                        va="center",
                        fontsize=9,
                        bbox=box,
                    )
            lefts += widths
        axes.grid(axis="y", visible=False)
    a_step.set(
        title="a step (median), ms",
        yticks=range(len(shown)),
        yticklabels=[name_of(run) for run in shown],
    )
    a_step.invert_yaxis()
    in_all.set(title="the run, % of its time")
    name_runs(figure)
    reading = (
        "Left: the time of a step, and in it the time that rank 0 waited for images. Right: the "
        "time of the run, without its start. Normal: networks and gradients take nearly all. "
        "They include logging, saving within epochs and waiting for slower workers. Refreshes "
        "and k-NN take a few percent of a long run. If waiting for images takes more than a "
        "tenth, use more loader processes (--workers), pack the data (job.pack), or augment on "
        "the GPU (--augment-on device)."
    )
    return finish(
        figure,
        "time",
        "Where the time goes",
        reading,
        f"Time of a step and of the run by activity, of {names(shown)}",
    )


def speed(runs: Sequence[Shown]) -> Picture | None:
    """Draw images per second over the epochs."""
    if not (shown := with_numbers(runs, "images_per_s")):
        return None
    figure = new_figure(3.0)
    axes = figure.subplots()
    for run in shown:
        draw_steps(axes, run, run.column("images_per_s"))
    axes.set(xlabel="epochs", ylabel="images a second, all workers")
    axes.set_ylim(bottom=0)
    name_runs(figure)
    reading = (
        "The images that all workers together train on in a second. Normal: level. Periodic dips "
        "are checkpoints, and the first step is slow. A lasting fall has a cause outside the "
        "run: another program on the machine, a slow disk, or a hot processor."
    )
    return finish(
        figure, "speed", "Speed", reading, f"Images a second over the epochs of {names(shown)}"
    )
