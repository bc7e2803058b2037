"""The style of pictures. Runs differ in colour, line and marker, so they work in grey."""

import dataclasses
import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from job.show.read.history import smooth
from job.show.read.runs import ReportRun
from job.text import printable

# By Okabe and Ito, for colour-blind readers. Successive colours also differ in brightness.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#7a5c00")
# 7 colours and 4 lines: 28 runs differ.
LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
HATCHES = ("", "////", "....", "xxxx")
WIDTH, DPI = 9.0, 130  # inches, dots an inch
LONG = 32  # characters of a run's label
POINTS = 1500  # of a line: more are not visible
LARGEST = 1e100  # matplotlib fails on axes whose range overflows
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
    """A picture of a report.

    name: of its file. reading: how to read it, and what is normal. alt: its description.
    """

    name: str
    title: str
    reading: str
    alt: str
    png: bytes
    width: int  # pixels
    height: int


def new_figure(height: float = 3.6, width: float = WIDTH) -> Figure:
    """Return an empty figure. height, width: inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish(figure: Figure, name: str, title: str, reading: str, alt: str) -> Picture:
    """Return a figure as a picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    return Picture(name, title, reading, alt, file.getvalue(), width, height)


def line_style(run: ReportRun) -> dict:
    """Return matplotlib's keywords for a run's line."""
    return {"color": COLOURS[run.index % len(COLOURS)], "linestyle": LINES[run.index % len(LINES)]}


def marker(run: ReportRun) -> str:
    """Return matplotlib's marker of a run."""
    return MARKERS[run.index % len(MARKERS)]


def escape(text: str) -> str:
    """Escape text for matplotlib: $ would start a formula, and a leading _ hides legend entries."""
    return " " * text.startswith("_") + printable(text).replace("$", r"\$")


def short_label(run: ReportRun) -> str:
    """Return a run's label, without its middle if it is long."""
    return escape(
        run.label
        if len(run.label) <= LONG
        else f"{run.label[: LONG // 2]}…{run.label[-LONG // 2 + 1 :]}"
    )


def draw_steps(axes: Axes, run: ReportRun, values: np.ndarray) -> None:
    """Draw a number of each step, (n,), over the epochs: faint, with its running mean in front."""
    values = drawable(values)
    every = max(1, len(values) // POINTS)
    means = smooth(values, max(every, len(values) // 50, 1))[::every]
    x = run.epochs[::every]
    axes.plot(
        x, smooth(values, every)[::every], color=line_style(run)["color"], linewidth=0.7, alpha=0.25
    )
    spacing = max(1, len(x) // 8)
    axes.plot(
        x,
        means,
        **line_style(run),
        marker=marker(run),
        markevery=(run.index * spacing // 5 % spacing, spacing),
        markersize=5,
        label=short_label(run),
    )


def draw_points(axes: Axes, run: ReportRun, x: ArrayLike, y: ArrayLike, **more: object) -> None:
    """Draw a few numbers over the epochs, each with the run's marker."""
    style = line_style(run) | {"marker": marker(run), "markersize": 6, "label": short_label(run)}
    axes.plot(x, drawable(y), **(style | more))


def drawable(values: ArrayLike) -> np.ndarray:
    """Return numbers as (n,) float64, with NaN for those that matplotlib cannot draw."""
    numbers = np.asarray(values, dtype=float)
    return np.where(np.abs(numbers) < LARGEST, numbers, np.nan)


def add_legend(figure: Figure) -> None:
    """Add a legend of the runs above a figure."""
    lines = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if lines:
        columns = max(1, min(len(lines), 4, 80 // (max(map(len, lines)) + 6)))
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside upper center",
            ncols=columns,
            handlelength=3.5,
        )
