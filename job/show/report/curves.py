"""A report's curves over the epochs. Each picture compares the runs that have its numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from job.metrics.bounds import DEAD, RANK, STD
from job.metrics.schema import own_size
from job.show.read.runs import ReportRun
from job.show.report.style import (
    Picture,
    add_legend,
    draw_points,
    draw_steps,
    finish,
    line_style,
    marker,
    new_figure,
    short_label,
)

EPOCHS = "epochs"
REFERENCE: dict[str, Any] = {"color": "#555555", "linewidth": 1.0, "linestyle": (0, (1, 2))}


def names(runs: Sequence[ReportRun]) -> str:
    """Return the labels of runs, for alt texts."""
    return ", ".join(run.label for run in runs)


def with_numbers(runs: Sequence[ReportRun], name: str) -> list[ReportRun]:
    """Return the runs whose steps have a number `name` that is not always 0."""
    return [run for run in runs if np.nan_to_num(run.column(name)).any()]


def guessing(runs: Sequence[ReportRun]) -> dict[float, int]:
    """Return {ln(K + 1): K} of the runs' queues: the loss of guessing which key is the positive."""
    queues = {int(run.option("moco_k", 0)) for run in with_numbers(runs, "contrastive")} - {0}
    return {math.log(K + 1): K for K in sorted(queues)}


def mark_guessing(axes: Axes, runs: Sequence[ReportRun]) -> None:
    """Draw lines at the loss of guessing."""
    for loss, K in guessing(runs).items():
        axes.axhline(loss, **REFERENCE)
        axes.annotate(
            f"ln({K} + 1)",
            (1, loss),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=9,
        )


def loss(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the minimised loss."""
    if not (shown := with_numbers(runs, "loss")):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for run in shown:
        draw_steps(axes, run, run.column("loss"))
    mark_guessing(axes, shown)
    axes.set(xlabel=EPOCHS, ylabel="loss")
    add_legend(figure)
    reading = "The thick line is the mean over some steps, the faint one each step. " + normal_loss(
        shown
    )
    return finish(figure, "loss", "Loss", reading, f"Loss over the epochs of {names(shown)}")


def normal_loss(runs: Sequence[ReportRun]) -> str:
    """Describe the normal course of the loss with the runs' frameworks."""
    normal = []
    if start := " or ".join(
        f"ln(K + 1) = {value:.2f} (K = {K} negatives)" for value, K in guessing(runs).items()
    ):
        normal.append(
            "Normal with MoCo: near 0 in the first steps, while the queue still holds random "
            f"keys. Then near the loss of guessing, {start}, plus the distillation loss if there "
            "is a teacher. From there it falls. A loss that stays at the dotted line means that "
            "the student has learned nothing. Check whether the learning rate is too high."
        )
    if with_numbers(runs, "cosine"):
        normal.append(
            "Normal with SimSiam: near 0 in the first steps, plus the distillation loss if there "
            "is a teacher. Then it falls towards -1. If it is near -1 in the first epoch, the "
            "student has collapsed."
        )
    return " ".join(normal) or "Normal: it falls."


def own_loss(run: ReportRun) -> np.ndarray:
    """Return the sum of the framework's losses at each of n steps, (n,), or (0,) without losses."""
    losses = [run.history.steps[name] for name in run.history.losses]
    return np.sum(losses, axis=0) if losses else np.zeros(0)


def terms(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the terms of the loss and their ratio. Return None without a framework's loss."""
    shown = [run for run in runs if np.nan_to_num(own_loss(run)).any()]
    distilled = with_numbers(runs, "distillation")
    if not shown:
        return None
    own = " or ".join(dict.fromkeys(" + ".join(run.history.losses) for run in shown))
    figure = new_figure(3.6)
    panels = figure.subplots(1, 3 if distilled else 1, squeeze=False)[0]
    for run in shown:
        draw_steps(panels[0], run, own_loss(run))
    mark_guessing(panels[0], shown)
    panels[0].set(title=f"{own} loss", xlabel=EPOCHS)
    for run in distilled:
        draw_steps(panels[1], run, run.column("distillation"))
    for run in [run for run in distilled if run in shown]:
        distillation = run.column("distillation")
        loss = own_size(run.history.steps, run.history.losses)
        draw_steps(
            panels[2],
            run,
            np.divide(distillation, loss, out=np.full_like(loss, np.nan), where=loss > 0),
        )
    if distilled:
        panels[1].set(title="distillation loss", xlabel=EPOCHS, yscale="log")
        panels[2].set(title="ratio", xlabel=EPOCHS, yscale="log")
        panels[2].axhline(1, **REFERENCE)
    add_legend(figure)
    reading = (
        f"The loss is the sum of the framework's loss ({own}) and the distillation loss, which "
        "makes the student's features like the teacher's. The ratio is the distillation loss "
        "over the framework's, or over 1, the range of a cosine loss. Normal: both fall, and "
        "their ratio stays about level. If the ratio is far above 1 (dotted), the student mostly "
        "imitates, which helps if the teacher is much better. A lower --loss-share or a higher "
        "--loss-factor weakens the distillation."
    )
    return finish(
        figure,
        "parts",
        "Terms of the loss",
        reading,
        f"Framework's and distillation loss, and their ratio, of {names(shown)}",
    )


def accuracy(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the contrast accuracy."""
    if not (shown := with_numbers(with_numbers(runs, "contrastive"), "accuracy")):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for run in shown:
        draw_steps(axes, run, run.column("accuracy"))
    axes.set(xlabel=EPOCHS, ylabel="contrast accuracy, %", ylim=(0, 100))
    add_legend(figure)
    reading = (
        "The percentage of a step's images whose nearest key is the key of their other view, not a "
        "key of the queue. Normal: near 100 in the first steps, while the queue still holds "
        "random keys, then near 0. It rises over the epochs and levels off well below 100. If it "
        "is soon near 100 again, the task is too easy: the queue is short, or the two views have "
        "a clue in common. If it is near 0 for long, the learning rate is too high, or the images "
        "are too similar."
    )
    return finish(
        figure,
        "accuracy",
        "Contrast accuracy",
        reading,
        f"Contrast accuracy over the epochs of {names(shown)}",
    )


def neighbours(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the k-NN accuracy over the epochs, and the AUC of the features if it is recorded."""
    if not (shown := [run for run in runs if run.history.knn]):
        return None
    figure = new_figure()
    measured = any("knn_auc" in record for run in shown for record in run.history.knn)
    axes, *others = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    for run in shown:
        draw_points(
            axes, run, [r["epoch"] for r in run.history.knn], [r["knn"] for r in run.history.knn]
        )
        last = run.history.knn[-1]
        beside: dict[str, Any] = dict(
            xytext=(8, 0), textcoords="offset points", va="center", fontsize=9
        )
        axes.annotate(f"{last['knn']:.1f}", (last["epoch"], last["knn"]), **beside)
    axes.set(xlabel=EPOCHS, ylabel="k-NN top-1, %")
    axes.set_xlim(left=0)
    for panel in others:
        draw_auc(panel, shown)
    add_legend(figure)
    reading = (
        "The percentage of validation images that have the label of their nearest training "
        "images, by features learned without labels. Normal: it rises from epoch to epoch, while "
        "the loss may hardly change. A single point is a run with one measurement."
    )
    if measured:
        reading += (
            " AUC is the area under the cumulated singular values of the normalised features of "
            "those images: 0.5 if they vary equally in all directions, 1 if only in one. Of two "
            "students of the same width, the one with the higher AUC is nearer to collapse."
        )
    return finish(
        figure, "knn", "k-NN accuracy", reading, f"k-NN accuracy over the epochs of {names(shown)}"
    )


def draw_auc(axes: Axes, runs: Sequence[ReportRun]) -> None:
    """Draw the AUC of the features' singular values over the epochs."""
    for run in runs:
        records = run.history.knn
        draw_points(
            axes, run, [r["epoch"] for r in records], [r.get("knn_auc", math.nan) for r in records]
        )
    axes.set(xlabel=EPOCHS, ylabel="AUC of singular values")
    axes.set_xlim(left=0)


def rate(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the learning rate and the refreshes of the matching."""
    if not (shown := with_numbers(runs, "lr")):
        return None
    figure = new_figure(3.0)
    axes = figure.subplots()
    for run in shown:
        epochs, rates = run.epochs, run.column("lr")
        changes = np.flatnonzero(np.diff(rates, prepend=np.nan, append=np.nan))
        refreshed = sorted({r["epoch"] for r in run.history.refreshes})
        first_steps = np.searchsorted(run.column("epoch"), refreshed)
        last = len(rates) - 1
        corners = np.concatenate([changes, changes[1:] - 1, [last]]).clip(0, last)
        corners.sort()
        axes.plot(epochs[corners], rates[corners], **line_style(run), label=short_label(run))
        axes.plot(
            refreshed,
            rates[first_steps.clip(0, last)],
            marker(run),
            color=line_style(run)["color"],
            markersize=8,
            fillstyle="none",
        )
    axes.set(xlabel=EPOCHS, ylabel="learning rate")
    axes.set_ylim(bottom=0)
    add_legend(figure)
    reading = (
        "The rate of each epoch. A hollow mark is a refresh: the run solved its matching again. "
        "Normal: a few refreshes, most of them early, while the student's channels still change "
        "their meaning."
    )
    return finish(
        figure,
        "rate",
        "Learning rate and refreshes",
        reading,
        f"Learning rate over the epochs of {names(shown)}",
    )


def collapse(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the signs of collapse, each with its bound."""
    if not (shown := [run for run in runs if run.history.signs]):
        return None
    figure = new_figure(3.3)
    ranked = any("queue_rank" in record for run in shown for record in run.history.signs)
    panels = figure.subplots(1, 3 if ranked else 2)
    for run in shown:
        records = run.history.signs
        positions = [(record["epoch"], record["step"]) for record in records]
        x = run.epochs_after(*np.array(positions, dtype=float).T).tolist()  # from (n, 2)
        dead = [
            100 * max((r[name] for name in r if name.startswith("dead_")), default=math.nan)
            for r in records
        ]
        ranks = [[r.get("queue_rank", math.nan) for r in records]] * ranked
        for axes, values in zip(
            panels, ([r["feature_std"] for r in records], dead, *ranks), strict=True
        ):
            draw_points(axes, run, x, values, markersize=5)
    titles = (
        "spread of the features",
        "dead channels, %, worst stage",
        *["rank of the queue"] * ranked,
    )
    for axes, title, bound in zip(panels, titles, (STD, 100 * DEAD, *[RANK] * ranked), strict=True):
        axes.set(title=title, xlabel=EPOCHS)
        axes.axhline(bound, **REFERENCE)
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(top=100)
    add_legend(figure)
    reading = (
        "A collapsed student has the same features for all images. Normal, after a dip in the "
        "first steps: the spread is a large fraction of 1"
        f"{', the rank is well above its bound (dotted)' * ranked}, and the channels that are "
        "positive for no image stay below their bound (dotted). A line that crosses its dotted "
        "bound is a collapse. The usual cause is a learning rate that is too high."
    )
    return finish(
        figure,
        "collapse",
        "Signs of collapse",
        reading,
        f"Spread of features, dead channels{' and rank of the queue' * ranked} of {names(shown)}",
    )


def linear(runs: Sequence[ReportRun]) -> Picture | None:
    """Draw the accuracy of linear classifiers over their epochs."""
    if not (shown := [run for run in runs if run.history.validation]):
        return None
    figure = new_figure()
    axes = figure.subplots()
    for run in shown:
        records = run.history.validation
        draw_points(
            axes,
            run,
            [record["epoch"] + 1 for record in records],
            [record["val_top1"] for record in records],
        )
    axes.set(xlabel="epochs of the classifier", ylabel="validation top-1, %")
    axes.set_xlim(left=0)
    add_legend(figure)
    reading = (
        "The validation accuracy of a linear classifier on frozen features. Normal: it rises "
        "quickly, jumps when the rate falls tenfold, and ends above the k-NN accuracy. The "
        "accuracy on a random network is the lower bound."
    )
    return finish(
        figure,
        "linear",
        "Linear classification",
        reading,
        f"Validation accuracy over the epochs of {names(shown)}",
    )
