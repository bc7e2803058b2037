"""A report's pictures of features: matched channels, nearest neighbours, two dimensions."""

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
from job.show.read.runs import Shown
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
from job.show.report.style import COLOURS, MARKERS, Picture, finish, new_figure, plain

QUERIES, NEAREST = 6, 6
RUNS = 6  # with pictures of features: each needs some seconds
LONGEST_SLUG = 50  # characters, of at most 4 bytes: names of files have 255 bytes
POINTS_OF_TSNE = 30  # fewer images are projected instead


@dataclasses.dataclass
class Seen:
    """Pictures of networks' features. notes: the pictures that are missing, with the reasons."""

    maps: list[Picture]
    neighbours: list[Picture]
    embeddings: list[Picture]
    notes: list[str]


def look_inside(runs: Sequence[Shown], data: Sequence[str], teacher: str) -> Seen:
    """Draw the features of the runs' newest students and of their teachers.

    data, teacher: their paths on this machine; if empty, those of the runs' options.
    """
    seen = Seen(
        [],
        [],
        [],
        [
            f"{run.label}: not shown; a report shows the networks of the first {RUNS} runs"
            for run in runs[RUNS:]
        ],
    )
    slugs = slugs_of([run.label for run in runs[:RUNS]])
    embedded: dict[Sample, list[tuple[str, torch.Tensor]]] = {}
    for run in runs[:RUNS]:
        try:
            student = newest_student(run.history)
            places = tuple(data or student.options["places"])
            sample = read_sample(places, student.options["image_size"])
            features = embed(network(student.backbone, student.options["image_size"]), sample)
        except RunError as error:
            seen.notes.append(f"{run.label}: {error}")
            continue
        embedded.setdefault(sample, []).append((run.label, features))
        seen.neighbours.append(neighbour_grid(run.label, slugs[run.label], sample, features))
        try:
            if student.matchings:
                found = matches(
                    student,
                    read_teacher(student, teacher or student.options["teacher"]),
                    sample.views[:MATCHED],
                )
                seen.maps += [
                    matched_maps(run.label, slugs[run.label], stage, some, sample)
                    for stage, some in found.items()
                ]
        except RunError as error:
            seen.notes.append(f"{run.label}: {error}. Name the teacher's file with --teacher")
    for sample, found_in in embedded.items():
        seen.embeddings.append(embeddings(found_in, sample, len(seen.embeddings)))
    return seen


def bare(axes: Axes, image: np.ndarray, **how: Any) -> None:
    """Draw an image or a map without an axis."""
    axes.imshow(image, interpolation="nearest", **how)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, linewidth=0.6)


def pixels(sample: Sample, place: int) -> np.ndarray:
    """Return an image of a sample, (H, W, 3)."""
    return sample.views[place].permute(1, 2, 0).numpy()


def matched_maps(label: str, slug: str, stage: int, found: list[Match], sample: Sample) -> Picture:
    """Draw images, and below each the maps of matched student and teacher channels."""
    shown = min(SHOWN, len(sample.views))
    figure = new_figure(1.25 * (1 + len(found)))
    grid = figure.subplots(
        1 + len(found), 1 + 2 * shown, width_ratios=[1.35] + [1] * (2 * shown), squeeze=False
    )
    for axes in grid[:, 0]:
        axes.set_axis_off()
    for image in range(shown):
        bare(grid[0, 1 + 2 * image], pixels(sample, image))
        grid[0, 2 + 2 * image].set_axis_off()
    for row, match in zip(grid[1:], found, strict=True):
        which = f"no. {match.rank + 1} in cost" if match.rank < 3 else "the median one"
        a, b = match.channels
        figures = (
            f"cost {match.cost:.2f}, corr. {match.correlation:.2f}\nmean cost {match.mean:.2f}"
        )
        words = f"{which}\nstudent {a}\nteacher {b}\n{figures}"
        row[0].text(0, 0.5, words, va="center", fontsize=9.5, transform=row[0].transAxes)
        for offset, maps in enumerate((match.student, match.teacher)):
            reach = float(np.abs(maps).max()) or 1.0
            for axes, image in zip(row[1 + offset :: 2], range(shown), strict=True):
                bare(axes, maps[image], cmap="gray", vmin=-reach, vmax=reach)
    for image in range(shown):
        for place, name in enumerate(("student", "teacher")):
            grid[1, 1 + 2 * image + place].set_title(name, fontsize=9.5)
    costs = ", ".join(f"{match.cost:.2f}" for match in found)
    reading = (
        "Each image, and below it the maps of matched channels of student and teacher, before "
        "the ReLU. White is positive, mid grey is 0, black is negative. Each channel is scaled "
        "by its largest value here. The rows are the three student channels whose matches have "
        "the lowest mean cost, and the median one, each with its nearest match. Normal: the "
        "cheapest pairs look alike, also on images where the object is elsewhere. The median "
        "pair looks less alike."
    )
    if found[0].student[0].size == 1:
        reading += " Here each map has one position, so the cost compares only signs."
    alt = f"Maps of matched channels of {label} and its teacher in stage {stage}, of cost {costs}, for {shown} images"
    return finish(
        figure, f"maps-{slug}-{stage}", f"Matched channels of {label}, stage {stage}", reading, alt
    )


def neighbour_grid(label: str, slug: str, sample: Sample, features: torch.Tensor) -> Picture:
    """Draw some images and their nearest neighbours, with cosines and labels."""
    m = len(features)
    queries = one_of_each(sample.labels[:m], QUERIES)
    places, cosines = nearest(features, queries, NEAREST)
    figure = new_figure(1.7 * len(queries))
    grid = figure.subplots(len(queries), 1 + places.shape[1], squeeze=False)
    right = 0
    for row, query, near, cosine in zip(grid, queries, places, cosines, strict=True):
        label_of = [sample.classes[sample.labels[place]] for place in (query, *near)]
        for axes, place, name in zip(row, (query, *near), label_of, strict=True):
            bare(axes, pixels(sample, place))
            axes.set_title(plain(shorten(name)), fontsize=9.5, pad=6)
        for axes, value, name in zip(row[1:], cosine, label_of[1:], strict=True):
            same = name == label_of[0]
            right += same
            axes.set_xlabel(
                f"{1 - value:.2f}" + ("" if same else "  other"), fontsize=9.5, labelpad=5
            )
            for spine in axes.spines.values() if not same else ():
                spine.set_position(("outward", 3))
                spine.set_linewidth(2.5)
        row[0].set_xlabel("query", fontsize=9.5, labelpad=5)
    reading = (
        f"Left: an image of {sample.root}. Then the {places.shape[1]} nearest of {m - 1} others "
        "by the student's features, each with its label above and the distance, 1 - cosine, "
        "below. A thick frame and the word other mark a different label. Normal: most neighbours "
        "have the same label, which training did not use, and confused images look "
        f"alike.{sample.remark}"
    )
    alt = f"Nearest neighbours of {len(queries)} images by the features of {label}: {right} of {places.size} have the same label"
    return finish(figure, f"neighbours-{slug}", f"Nearest neighbours, {label}", reading, alt)


def embeddings(found: Sequence[tuple[str, torch.Tensor]], sample: Sample, number: int) -> Picture:
    """Draw features of the same images in two dimensions, a panel for each (label, features)."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(0.6 + {1: 6.0, 2: 4.2, 3: 3.1}[columns] * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    how = set()
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, (title, features) in zip(panels, found, strict=False):
        flat, method = flatten(features.numpy())
        how.add(method)
        labels = sample.labels[: len(flat)]
        for place, label in enumerate(np.unique(sample.labels)):
            some = flat[labels == label]
            colour, mark = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            name = plain(shorten(sample.classes[label]))
            if re.fullmatch("[0-9A-Za-z]", name):
                mark = f"${name}$"
            axes.scatter(
                *some.T,
                s=30 if columns < 3 else 22,
                marker=mark,
                color=colour,
                linewidths=0.3,
                alpha=0.85,
                label=name,
            )
        axes.set(title=plain(shorten(title, 32)), xticks=[], yticks=[])
        axes.grid(visible=False)
    handles, names = panels[0].get_legend_handles_labels()
    if not all(re.fullmatch("[0-9A-Za-z]", name) for name in names):  # else the marks are the names
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(5, len(names)), markerscale=1.5
        )
    reading = (
        f"Each mark is an image of {sample.root}. Similar features are near each other "
        f"({' or '.join(sorted(how))}). Colour and mark are the label. Directions and the size of "
        "gaps have no meaning. Normal: images of a label gather as training proceeds, although it "
        "does not use labels. If all labels are mixed in one cloud, the student has not learned, "
        f"or has collapsed.{sample.remark}"
    )
    alt = f"Features of {len(sample.labels)} images in two dimensions, for {', '.join(label for label, _ in found)}"
    return finish(figure, f"embedding{number or ''}", "Features in two dimensions", reading, alt)


def flatten(features: np.ndarray) -> tuple[np.ndarray, str]:
    """Project features (n, C) to (n, 2), deterministically; return them and the method's name."""
    if len(features) < POINTS_OF_TSNE:
        return PCA(2, random_state=0).fit_transform(features), "principal components"
    return TSNE(
        2, perplexity=min(30.0, len(features) / 4), init="pca", random_state=0
    ).fit_transform(features), "t-SNE"


def one_of_each(labels: np.ndarray, number: int) -> list[int]:
    """Return the first image of each label, and further ones if there are too few labels."""
    firsts = np.sort(np.unique(labels, return_index=True)[1]).tolist()
    return (firsts + [place for place in range(len(labels)) if place not in firsts])[:number]


def shorten(name: str, most: int = 12) -> str:
    """Cut a name to the width of a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def slugs_of(labels: Sequence[str]) -> dict[str, str]:
    """Return {label: slug}, unique slugs of runs' labels for file names."""
    found: dict[str, str] = {}
    for label in labels:
        slug = re.sub(r"[^\w.-]+", "-", label)[:LONGEST_SLUG]
        while slug in found.values():
            slug += "-"
        found[label] = slug
    return found
