"""A picture of a set's accuracies: a row for each arm, a point for each seed."""

from typing import Any

import matplotlib

from job.show.report.style import COLOURS, STYLE, Picture, finish, new_figure
from job.study.findings import Scores
from job.study.form import ALONE, TEACHER, UNTRAINED


def draw(name: str, records: list[dict[str, Any]], measures: dict[str, str]) -> Picture:
    """Draw a set's records by each of `measures`, {key of records: name}, side by side."""
    arms = list(dict.fromkeys([UNTRAINED, ALONE, TEACHER, *(record["arm"] for record in records)]))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(1.2 + 0.28 * len(arms))
        for axes, measure in zip(
            figure.subplots(1, len(measures), sharey=True), measures, strict=True
        ):
            scores = Scores.of(measure, records)
            mean, spread = scores.mean(ALONE), scores.spread(ALONE)
            axes.axvspan(mean - spread, mean + spread, color="#e4e4e4", linewidth=0)
            axes.axvline(mean, color=COLOURS[0], linewidth=1)
            for row, arm in enumerate(arms):
                axes.plot(
                    scores.by_arm[arm],
                    [row] * len(scores.by_arm[arm]),
                    "o",
                    color=COLOURS[5],
                    markersize=4,
                )
                axes.plot(
                    scores.mean(arm), row, "|", color=COLOURS[2], markersize=13, markeredgewidth=2.5
                )
            axes.set_title(f"{scores.measure} top-1, %")
            axes.set_yticks(range(len(arms)), arms)
        axes.invert_yaxis()
        caption = "Points: seeds. Bars: their means. Line and band: mean and standard deviation "
        caption += "over seeds of the student alone."
        return finish(
            figure,
            name,
            f"{name}: accuracies",
            caption,
            f"accuracies of {len(arms)} networks on {name}",
        )
