"""How a report's pictures are drawn: all alike, and each run known by colour, line and marker, so that grey is enough."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from job.show.read.history import smooth
from job.show.read.runs import Shown
from job.text import printable

# Of Okabe and Ito, which people see apart who see few colours; neighbours differ in brightness as well.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#7a5c00")
LINES = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
)  # 7 colours and 4 lines: 28 runs are unlike
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
HATCHES = ("", "////", "....", "xxxx")
WIDTH, DPI = 9.0, 130  # inches, dots an inch
LONG = 32  # characters of a run's label
POINTS = 1500  # of a line: more cannot be seen
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a report. name: of its file. reading: how it is read, and what is normal. alt: what it shows, in words."""

    name: str
    title: str
    reading: str
    alt: str
    png: bytes
    width: int  # pixels
    height: int


def new_figure(height: float = 3.6, width: float = WIDTH) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish(figure: Figure, name: str, title: str, reading: str, alt: str) -> Picture:
    """Make the PNG of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    return Picture(name, title, reading, alt, file.getvalue(), width, height)


def look(run: Shown) -> dict:
    """matplotlib's words for the line of a run."""
    return {"color": COLOURS[run.place % len(COLOURS)], "linestyle": LINES[run.place % len(LINES)]}


def marker(run: Shown) -> str:
    """matplotlib's word for the marker of a run."""
    return MARKERS[run.place % len(MARKERS)]


def plain(text: str) -> str:
    """Text as matplotlib must show it: $ begins no formula, and a leading _ does not keep it from the legend."""
    return " " * text.startswith("_") + printable(text).replace("$", r"\$")


def name_of(run: Shown) -> str:
    """The label of a run, without its middle where it is long."""
    return plain(
        run.label
        if len(run.label) <= LONG
        else f"{run.label[: LONG // 2]}…{run.label[-LONG // 2 + 1 :]}"
    )


def draw_steps(axes: Axes, run: Shown, values: np.ndarray) -> None:
    """Draw a number of each step (n,) over the epochs: faint as it is, and its running mean as the run's line."""
    every = max(1, len(values) // POINTS)
    means = smooth(values, max(every, len(values) // 50, 1))[::every]
    x = run.epochs[::every]
    axes.plot(
        x, smooth(values, every)[::every], color=look(run)["color"], linewidth=0.7, alpha=0.25
    )
    apart = max(1, len(x) // 8)
    axes.plot(
        x,
        means,
        **look(run),
        marker=marker(run),
        markevery=(run.place * apart // 5 % apart, apart),
        markersize=5,
        label=name_of(run),
    )


def draw_points(
    axes: Axes, run: Shown, x: Sequence[float], y: Sequence[float], **more: object
) -> None:
    """Draw a few numbers over the epochs, each with the run's marker."""
    axes.plot(
        x,
        y,
        **({**look(run), "marker": marker(run), "markersize": 6, "label": name_of(run)} | more),
    )


def name_runs(figure: Figure) -> None:
    """Say above a figure which line is which run's, each once."""
    found = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if found:
        columns = max(1, min(len(found), 4, 80 // (max(map(len, found)) + 6)))
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside upper center",
            ncols=columns,
            handlelength=3.5,
        )
