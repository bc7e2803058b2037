"""A report's pictures of the refreshes of matchings of student and teacher channels."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from job.show.read.runs import ReportRun
from job.show.report.curves import names
from job.show.report.style import (
    LONG,
    Picture,
    add_legend,
    draw_points,
    drawable,
    escape,
    finish,
    line_style,
    marker,
    new_figure,
)

MOST_PANELS, MOST_COLUMNS = 12, 4
Refreshed = tuple[str, int]  # a distiller's name and a stage


def panels(runs: Sequence[ReportRun]) -> tuple[Figure, dict[Refreshed, Axes]] | None:
    """Return a figure with a panel for each distiller and stage, or None without refreshes."""
    refreshes = [record for run in runs for record in run.history.refreshes]
    keys = sorted({(record["distiller"], record["stage"]) for record in refreshes})[:MOST_PANELS]
    if not keys:
        return None
    several = len({distiller for distiller, _ in keys}) > 1
    columns = min(len(keys), MOST_COLUMNS)
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(3.3 * rows)
    axes_of = dict(
        zip(keys, figure.subplots(rows, columns, sharey=True, squeeze=False).flat, strict=False)
    )
    for axes in figure.axes[len(keys) :]:
        axes.remove()
    for (distiller, stage), axes in axes_of.items():
        axes.set(
            title=escape(f"{distiller[:LONG]}, stage {stage}" if several else f"stage {stage}"),
            xlabel="epochs",
        )
    return figure, axes_of


def of_stage(run: ReportRun, refreshed: Refreshed, *names: str) -> list[list[float]]:
    """Return numbers of a distiller's refreshes of a stage: of each epoch, the last record's."""
    records = {
        record["epoch"]: record
        for record in run.history.refreshes
        if (record["distiller"], record["stage"]) == refreshed
    }
    return [[record.get(name, math.nan) for record in records.values()] for name in names]


def stability(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the fraction of channels whose match each refresh changed."""
    shown = [run for run in runs if run.history.refreshes]
    if not (drawn := panels(shown)):
        return None
    figure, stages = drawn
    for stage, axes in stages.items():
        for run in shown:
            epochs, changed = of_stage(run, stage, "epoch", "changed")
            draw_points(axes, run, epochs, [100 * fraction for fraction in changed])
        axes.set_ylim(0, 105)
    next(iter(stages.values())).set_ylabel("channels with a new match, %")
    add_legend(figure)
    reading = (
        "The percentage of the student's channels that a refresh matched with other teacher "
        "channels. Normal: the first refresh changes nearly all, because there is no matching "
        "before it. Later ones change fewer and fewer. If it stays high, the channels keep "
        "changing their meaning, and so do the targets of the distillation."
    )
    return finish(
        figure,
        "stability",
        "Stability of the matching",
        reading,
        f"Fraction of channels with a new match at each refresh of {names(shown)}",
    )


def cost(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the mean cost of matched pairs before and after each refresh."""
    shown = [run for run in runs if run.history.refreshes]
    if not (drawn := panels(shown)):
        return None
    figure, stages = drawn
    for stage, axes in stages.items():
        for run in shown:
            epochs, *costs = of_stage(run, stage, "epoch", "cost_before", "cost_after")
            before, after = map(drawable, costs)
            colour = line_style(run)["color"]
            axes.vlines(epochs, after, before, color=colour, linewidth=1.2)
            axes.plot(epochs, before, marker(run), color=colour, fillstyle="none", markersize=6)
            draw_points(axes, run, epochs, after)
    next(iter(stages.values())).set_ylabel("cost of a matched pair")
    add_legend(figure)
    reading = (
        "The distance of matched channels on the refresh's images: 0 is the same map, 2 is "
        "unrelated, 4 is the opposite. A hollow mark is the old matching, a filled one the new. "
        "Normal: each refresh lowers the cost. Between refreshes it falls while the student "
        "becomes more like its teacher."
    )
    return finish(
        figure,
        "cost",
        "Cost of the matching",
        reading,
        f"Cost of matched pairs before and after each refresh of {names(shown)}",
    )
