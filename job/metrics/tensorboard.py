"""TensorBoard's pictures and distributions: the distiller's tensors, random views, matchings."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from job.metrics.log import Log
from job.position import Position

IMAGES, COLUMNS = 8, 4
SIDE = 112  # pixels, of a view
COSTS, CHANGES = (512, 256), (256, 256)  # pixels, width and height of the panels of a matching
GAP, LINE = 8, 16  # pixels, between what is drawn, and of a line of text
WHITE = np.uint8(255)


def histograms(log: Log, epoch: int, values: Mapping[str, np.ndarray]) -> None:
    """Show distributions at the start of an epoch, by name."""
    if log.events:
        for name, numbers in values.items():
            log.events.histogram(name, Position(epoch, 0), numbers)


def views(log: Log, name: str, epoch: int, given: Sequence[torch.Tensor]) -> None:
    """Show the views (B, 3, H, W) uint8 of an epoch's first images, in epochs 0, 1, 2, 4, 8, ...

    name: of the views, in the picture's tag.
    """
    if log.events and epoch & (epoch - 1) == 0:
        picture = draw_views([view[:IMAGES].cpu() for view in given])
        log.events.picture(f"views/{name}", Position(epoch, 0), picture)


def matching(
    log: Log,
    distiller: str,
    epoch: int,
    stage: int,
    cost: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
) -> None:
    """Show a stage's costs (S, T) in the order of its new matching (G, S), and its changes."""
    if log.events:
        picture = draw_matching(f"layer{stage}", cost.numpy(), before.numpy(), after.numpy())
        log.events.picture(f"matching/{distiller}/layer{stage}", Position(epoch, 0), picture)


def draw_views(given: Sequence[torch.Tensor]) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 of views (n, 3, h, w) uint8, each image's side by side."""
    cells, line = [], np.full((SIDE, 2, 3), WHITE)
    for one in zip(*given, strict=True):
        shown = [sized(view.permute(1, 2, 0).numpy(), (SIDE, SIDE)) for view in one]
        cells.append(np.hstack([shown[0], *(part for view in shown[1:] for part in (line, view))]))
    cells += [np.full_like(cells[0], WHITE)] * (-len(cells) % COLUMNS)
    padded = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=WHITE) for cell in cells]
    return np.vstack(
        [np.hstack(padded[first : first + COLUMNS]) for first in range(0, len(padded), COLUMNS)]
    )


def draw_matching(name: str, cost: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a stage's costs (S, T), and of the change from one matching (G, S) to the next.

    Student channels are in an order that puts like ones together. On the left the cost of each pair, less the means of its two
    channels, teacher channels in the order of their student channel, those of none at the end: the diagonal are the matched
    pairs, the darker the nearer. On the right a dot for each teacher channel: its student channel before, across, and now, down.
    """
    S, T = cost.shape
    rest = cost - cost.mean(0) - cost.mean(1, keepdims=True) + cost.mean()
    students = (
        np.linalg.eigh(rest @ rest.T).eigenvectors[:, -1].argsort()
    )  # (S,), by what tells their costs apart most
    teachers = np.concatenate(
        [after[:, students].T.ravel(), np.setdiff1d(np.arange(T), after)]
    )  # (T,)
    shown = sized(least(rest[np.ix_(students, teachers)], COSTS).astype(np.float32), COSTS)
    low, high = np.percentile(shown, [0.5, 99.5])
    costs = colours((255 * (shown - low) / max(high - low, 1e-12)).clip(0, 255).astype(np.uint8))

    was, now = (np.full(T, -1) for _ in range(2))  # places of student channels
    for place, matching in ((was, before), (now, after)):
        place[matching[:, students]] = np.arange(S)  # the same for all G rows
    both = (was >= 0) & (now >= 0)
    moved = np.zeros((S, S), bool)
    moved[now[both], was[both]] = True
    stayed = 100 * (was == now)[both].mean() if both.any() else 0
    titles = (
        (
            f"{name}: costs of {S} student channels, like ones together (down), with",
            f"{T} teacher channels, by student channel (across)",
        ),
        (
            f"{stayed:.0f} % of teacher channels stay; student",
            "channel before (across), now (down)",
        ),
    )
    return framed(costs, dots(moved, CHANGES), titles, (low, high))


def framed(
    costs: np.ndarray,
    changes: np.ndarray,
    titles: Sequence[Sequence[str]],
    ends: tuple[float, float],
) -> np.ndarray:
    """The panels (H, W, 3) and (H, W) of a matching side by side, each under its lines, with the scale of colours below."""
    canvas = Image.new(
        "RGB", (COSTS[0] + CHANGES[0] + 7 * GAP, COSTS[1] + 4 * LINE + 2 * GAP), "white"
    )
    draw, font, top, below = (
        ImageDraw.Draw(canvas),
        ImageFont.load_default(13),
        2 * LINE + GAP,
        2 * LINE + COSTS[1] + 2 * GAP,
    )
    for left, panel, lines in zip((GAP, COSTS[0] + 3 * GAP), (costs, changes), titles, strict=True):
        draw.rectangle(
            (left - 1, top - 1, left + panel.shape[1], top + panel.shape[0]), outline="grey"
        )
        canvas.paste(Image.fromarray(panel), (left, top))
        for row, line in enumerate(lines):
            draw.text((left, 4 + row * LINE), line, "black", font)
    scale = Image.fromarray(colours(np.tile(np.arange(256, dtype=np.uint8), (LINE - 4, 1))))
    draw.text((GAP, below), f"cost, less its channels' means: {ends[0]:.2f}", "black", font)
    canvas.paste(scale, (GAP + 230, below + 2))
    draw.text((GAP + 230 + 256 + GAP, below), f"{ends[1]:.2f}", "black", font)
    return np.asarray(canvas)


def least(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (H, W) made fewer than twice a size (width, height), by the least of each block: single pairs stay visible."""
    h, w = max(1, values.shape[0] // size[1]), max(1, values.shape[1] // size[0])
    H, W = values.shape[0] // h, values.shape[1] // w
    return values[: H * h, : W * w].reshape(H, h, W, w).min(axis=(1, 3))


def sized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) at a size (width, height): averages where there are more, whole squares where fewer."""
    larger = pixels.shape[1] > size[0] or pixels.shape[0] > size[1]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_NEAREST)


def dots(marks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Marks (S, S) as black dots of at least 2 pixels on white, (height, width) uint8."""
    picture = np.full(size[::-1], WHITE)
    side = max(2, size[0] // len(marks))
    for y, x in np.argwhere(marks):
        y, x = (
            y * (size[1] - side) // max(1, len(marks) - 1),
            x * (size[0] - side) // max(1, len(marks) - 1),
        )
        picture[y : y + side, x : x + side] = 0
    return picture


def colours(shades: np.ndarray) -> np.ndarray:
    """Shades (H, W) uint8 as colours (H, W, 3), the lighter the larger, in print too."""
    return cv2.cvtColor(cv2.applyColorMap(shades, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
