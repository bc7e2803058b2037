"""A report's pictures of the matching between teacher and student channels, as refreshes tell it."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from job.show.read.runs import Shown
from job.show.report.curves import names
from job.show.report.style import Picture, draw_points, finish, look, marker, name_runs, new_figure


def panels(runs: Sequence[Shown]) -> tuple[Figure, dict[int, Axes]] | None:
    """A figure with a panel for each stage that one of `runs` has refreshed, {stage: panel}; None if none has."""
    stages = sorted({int(record["stage"]) for run in runs for record in run.history.refreshes})
    if not stages:
        return None
    figure = new_figure(3.3)
    found = dict(zip(stages, figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], strict=True))
    for stage, axes in found.items():
        axes.set(title=f"stage {stage}", xlabel="epochs")
    return figure, found


def of_stage(run: Shown, stage: int, *names: str) -> list[list[float]]:
    """Columns of the records of a run's refreshes of a stage; one of a refresh that was done again is the last."""
    records = {record["epoch"]: record for record in run.history.refreshes if record["stage"] == stage}
    return [[record.get(name, math.nan) for record in records.values()] for name in names]


def stability(runs: Sequence[Shown]) -> Picture | None:
    """The share of channels that each refresh matched anew."""
    shown = [run for run in runs if run.history.refreshes]
    if not (found := panels(shown)):
        return None
    figure, stages = found
    for stage, axes in stages.items():
        for run in shown:
            epochs, changed = of_stage(run, stage, "epoch", "changed")
            draw_points(axes, run, epochs, [100 * share for share in changed])
        axes.set_ylim(0, 105)
    next(iter(stages.values())).set_ylabel("channels matched anew, %")
    name_runs(figure)
    reading = (
        "The share of the student's channels to which a refresh gave other teacher channels. Normal: the first refresh changes "
        "nearly all, as it begins from no matching, and later ones change fewer and fewer. A share that stays high says that "
        "channels keep changing their meaning, and that what the distillation pulls them to changes with them."
    )
    return finish(
        figure,
        "stability",
        "Stability of the matching",
        reading,
        f"Share of channels matched anew at each refresh of {names(shown)}",
    )


def cost(runs: Sequence[Shown]) -> Picture | None:
    """The mean cost of matched pairs before and after each refresh."""
    shown = [run for run in runs if run.history.refreshes]
    if not (found := panels(shown)):
        return None
    figure, stages = found
    for stage, axes in stages.items():
        for run in shown:
            epochs, before, after = of_stage(run, stage, "epoch", "cost_before", "cost_after")
            colour = look(run)["color"]
            axes.vlines(epochs, after, before, color=colour, linewidth=1.2)
            axes.plot(epochs, before, marker(run), color=colour, fillstyle="none", markersize=6)
            draw_points(axes, run, epochs, after)
    next(iter(stages.values())).set_ylabel("cost of a matched pair")
    name_runs(figure)
    reading = (
        "How far apart matched channels are on the refresh's images: 0 is the same map, 2 has nothing in common, 4 is the "
        "opposite. A hollow mark is the old matching, a filled one the new. Normal: each refresh lowers the cost, and "
        "between two of them it falls as the student comes nearer to its teacher."
    )
    return finish(
        figure, "cost", "Cost of the matching", reading, f"Cost of matched pairs before and after each refresh of {names(shown)}"
    )
