"""A report's pictures of features: matched channels, nearest neighbours, embeddings."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from job.errors import RunError
from job.show.read.runs import ReportRun
from job.show.report.features import (
    MATCHED,
    SHOWN,
    Match,
    Sample,
    embed,
    matches,
    nearest,
    network,
    newest_student,
    read_sample,
    read_teacher,
)
from job.show.report.style import COLOURS, MARKERS, Picture, escape, finish, new_figure

QUERIES, NEAREST = 6, 6
RUNS = 6  # with pictures of features; each needs some seconds
LONGEST_SLUG = 50  # characters of at most 4 bytes; file names have at most 255 bytes
POINTS_OF_TSNE = 30  # for fewer images, PCA replaces t-SNE


@dataclasses.dataclass
class FeaturePictures:
    """Pictures of networks' features. notes: missing pictures and the reasons."""

    maps: list[Picture]
    neighbours: list[Picture]
    embeddings: list[Picture]
    notes: list[str]


def draw_features(runs: Sequence[ReportRun], data: Sequence[str], teacher: str) -> FeaturePictures:
    """Draw the features of the runs' newest students and of their teachers.

    data, teacher: paths on this machine; if empty, as in the runs' options.
    """
    drawn = FeaturePictures(
        [],
        [],
        [],
        [
            f"{run.label}: a report shows features of the first {RUNS} runs only"
            for run in runs[RUNS:]
        ],
    )
    slugs = slugs_of([run.label for run in runs[:RUNS]])
    embedded: dict[Sample, list[tuple[str, torch.Tensor]]] = {}
    for run in runs[:RUNS]:
        try:
            student = newest_student(run.history)
            paths = tuple(data or student.options["data"])
            sample = read_sample(paths, student.options["image_size"])
            features = embed(network(student.backbone, student.options["image_size"]), sample)
        except RunError as error:
            drawn.notes.append(f"{run.label}: {error}")
            continue
        embedded.setdefault(sample, []).append((run.label, features))
        drawn.neighbours.append(neighbour_grid(run.label, slugs[run.label], sample, features))
        try:
            if student.matchings:
                matched = matches(
                    student,
                    read_teacher(student, teacher or student.options["teacher"]),
                    sample.views[:MATCHED],
                )
                drawn.maps += [
                    matched_maps(run.label, slugs[run.label], stage, pairs, sample)
                    for stage, pairs in matched.items()
                ]
        except RunError as error:
            drawn.notes.append(f"{run.label}: {error}. Name the teacher's file with --teacher")
    for sample, labelled in embedded.items():
        drawn.embeddings.append(embeddings(labelled, sample, len(drawn.embeddings)))
    return drawn


def bare(axes: Axes, image: np.ndarray, **options: Any) -> None:
    """Draw an image or a map without an axis."""
    axes.imshow(image, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, linewidth=0.6)


def pixels(sample: Sample, index: int) -> np.ndarray:
    """Return an image of a sample, (H, W, 3) uint8."""
    return sample.views[index].permute(1, 2, 0).numpy()


def matched_maps(label: str, slug: str, stage: int, pairs: list[Match], sample: Sample) -> Picture:
    """Draw images, and below each the maps of matched student and teacher channels."""
    shown = min(SHOWN, len(sample.views))
    figure = new_figure(1.25 * (1 + len(pairs)))
    grid = figure.subplots(
        1 + len(pairs), 1 + 2 * shown, width_ratios=[1.35] + [1] * (2 * shown), squeeze=False
    )
    for axes in grid[:, 0]:
        axes.set_axis_off()
    for image in range(shown):
        bare(grid[0, 1 + 2 * image], pixels(sample, image))
        grid[0, 2 + 2 * image].set_axis_off()
    for row, match in zip(grid[1:], pairs, strict=True):
        rank = f"no. {match.rank + 1} in cost" if match.rank < 3 else "the median one"
        a, b = match.channels
        numbers = (
            f"cost {match.cost:.2f}, corr. {match.correlation:.2f}\nmean cost {match.mean:.2f}"
        )
        text = f"{rank}\nstudent {a}\nteacher {b}\n{numbers}"
        row[0].text(0, 0.5, text, va="center", fontsize=9.5, transform=row[0].transAxes)
        for offset, maps in enumerate((match.student, match.teacher)):
            largest = float(np.abs(maps).max()) or 1.0
            for axes, image in zip(row[1 + offset :: 2], range(shown), strict=True):
                bare(axes, maps[image], cmap="gray", vmin=-largest, vmax=largest)
    for image in range(shown):
        for offset, name in enumerate(("student", "teacher")):
            grid[1, 1 + 2 * image + offset].set_title(name, fontsize=9.5)
    costs = ", ".join(f"{match.cost:.2f}" for match in pairs)
    reading = (
        "Each image, and below it the maps of matched channels of student and teacher, before "
        "the ReLU. White is positive, mid grey is 0, black is negative. Each channel is scaled "
        "by its largest value here. The rows are the three student channels whose matches have "
        "the lowest mean cost, and the median one, each with its nearest match. Normal: the "
        "cheapest pairs look alike, also on images where the object is elsewhere. The median "
        "pair looks less alike."
    )
    if pairs[0].student[0].size == 1:
        reading += " Here each map has one position, so the cost compares only signs."
    alt = (
        f"Maps of matched channels of {label} and its teacher in stage {stage}, of cost {costs}, "
        f"for {shown} images"
    )
    return finish(
        figure, f"maps-{slug}-{stage}", f"Matched channels of {label}, stage {stage}", reading, alt
    )


def neighbour_grid(label: str, slug: str, sample: Sample, features: torch.Tensor) -> Picture:
    """Draw some images and their nearest neighbours, with cosines and labels."""
    m = len(features)
    queries = one_of_each(sample.labels[:m], QUERIES)
    neighbours, cosines = nearest(features, queries, NEAREST)
    figure = new_figure(1.7 * len(queries))
    grid = figure.subplots(len(queries), 1 + neighbours.shape[1], squeeze=False)
    correct = 0
    for row, query, near, cosine in zip(grid, queries, neighbours, cosines, strict=True):
        labels = [sample.classes[sample.labels[index]] for index in (query, *near)]
        for axes, index, name in zip(row, (query, *near), labels, strict=True):
            bare(axes, pixels(sample, index))
            axes.set_title(escape(shorten(name)), fontsize=9.5, pad=6)
        for axes, value, name in zip(row[1:], cosine, labels[1:], strict=True):
            same = name == labels[0]
            correct += same
            axes.set_xlabel(
                f"{1 - value:.2f}" + ("" if same else "  other"), fontsize=9.5, labelpad=5
            )
            for spine in axes.spines.values() if not same else ():
                spine.set_position(("outward", 3))
                spine.set_linewidth(2.5)
        row[0].set_xlabel("query", fontsize=9.5, labelpad=5)
    reading = (
        f"Left: an image of {sample.root}. Then the {neighbours.shape[1]} nearest of {m - 1} "
        "others by the student's features, each with its label above and the distance, "
        "1 - cosine, below. A thick frame and the text other mark a different label. Normal: most "
        "neighbours have the same label, which training did not use, and confused images look "
        f"alike.{sample.remark}"
    )
    alt = (
        f"Nearest neighbours of {len(queries)} images by the features of {label}: "
        f"{correct} of {neighbours.size} have the same label"
    )
    return finish(figure, f"neighbours-{slug}", f"Nearest neighbours, {label}", reading, alt)


def embeddings(runs: Sequence[tuple[str, torch.Tensor]], sample: Sample, number: int) -> Picture:
    """Draw features of the same images in two dimensions, one panel for each (label, features)."""
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = new_figure(0.6 + {1: 6.0, 2: 4.2, 3: 3.1}[columns] * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    methods = set()
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    for axes, (title, features) in zip(panels, runs, strict=False):
        points, method = flatten(features.numpy())  # (m, 2)
        methods.add(method)
        labels = sample.labels[: len(points)]
        for index, label in enumerate(np.unique(sample.labels)):
            colour, mark = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            name = escape(shorten(sample.classes[label]))
            if re.fullmatch("[0-9A-Za-z]", name):
                mark = f"${name}$"
            axes.scatter(
                *points[labels == label].T,
                s=30 if columns < 3 else 22,
                marker=mark,
                color=colour,
                linewidths=0.3,
                alpha=0.85,
                label=name,
            )
        axes.set(title=escape(shorten(title, 32)), xticks=[], yticks=[])
        axes.grid(visible=False)
    handles, names = panels[0].get_legend_handles_labels()
    if not all(re.fullmatch("[0-9A-Za-z]", name) for name in names):  # else the marks are the names
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(5, len(names)), markerscale=1.5
        )
    reading = (
        f"Each mark is an image of {sample.root}. Similar features are near each other "
        f"({' or '.join(sorted(methods))}). Colour and mark are the label. Directions and the size "
        "of gaps have no meaning. Normal: images of a label gather as training proceeds, although "
        "it does not use labels. If all labels are mixed in one cloud, the student has not "
        f"learned, or has collapsed.{sample.remark}"
    )
    alt = (
        f"Features of {len(sample.labels)} images in two dimensions, "
        f"for {', '.join(label for label, _ in runs)}"
    )
    return finish(figure, f"embedding{number or ''}", "Features in two dimensions", reading, alt)


def flatten(features: np.ndarray) -> tuple[np.ndarray, str]:
    """Project features (m, C) to (m, 2) deterministically. Return them and the method's name."""
    if len(features) < POINTS_OF_TSNE:
        return PCA(2, random_state=0).fit_transform(features), "principal components"
    return TSNE(
        2, perplexity=min(30.0, len(features) / 4), init="pca", random_state=0
    ).fit_transform(features), "t-SNE"


def one_of_each(labels: np.ndarray, number: int) -> list[int]:
    """Return indices of the first image of each label, and others if there are too few labels."""
    firsts = np.sort(np.unique(labels, return_index=True)[1]).tolist()
    return (firsts + [index for index in range(len(labels)) if index not in firsts])[:number]


def shorten(name: str, most: int = 12) -> str:
    """Cut a name to the width of a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def slugs_of(labels: Sequence[str]) -> dict[str, str]:
    """Return {label: slug}, unique slugs of runs' labels for file names."""
    slugs: dict[str, str] = {}
    for label in labels:
        slug = re.sub(r"[^\w.-]+", "-", label)[:LONGEST_SLUG]
        while slug in slugs.values():
            slug += "-"
        slugs[label] = slug
    return slugs
