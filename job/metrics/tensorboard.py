"""TensorBoard's pictures and histograms: a distiller's tensors, views and matchings."""

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
GAP, LINE = 8, 16  # pixels, between panels, and height of a text line
WHITE = np.uint8(255)


def histograms(log: Log, epoch: int, values: Mapping[str, np.ndarray]) -> None:
    """Write distributions at the start of an epoch, by name."""
    if log.events:
        for name, numbers in values.items():
            log.events.histogram(name, Position(epoch, 0), numbers)


def views(log: Log, name: str, epoch: int, given: Sequence[torch.Tensor]) -> None:
    """Write a picture of views of an epoch's first images, in epochs 0, 1, 2, 4, 8, ...

    name: of the views, for the picture's tag. given: the views, (B, 3, H, W) uint8 each.
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
    """Write a picture of a stage's costs (S, T) and of its old and new matching (G, S)."""
    if log.events:
        picture = draw_matching(f"layer{stage}", cost.numpy(), before.numpy(), after.numpy())
        log.events.picture(f"matching/{distiller}/layer{stage}", Position(epoch, 0), picture)


def draw_views(given: Sequence[torch.Tensor]) -> np.ndarray:
    """Return a picture (H, W, 3) uint8. given: views (n, 3, h, w) uint8, drawn side by side."""
    cells, line = [], np.full((SIDE, 2, 3), WHITE)
    for one in zip(*given, strict=True):
        shown = [sized(view.permute(1, 2, 0).numpy(), (SIDE, SIDE)) for view in one]
        others = (block for view in shown[1:] for block in (line, view))
        cells.append(np.hstack([shown[0], *others]))
    cells += [np.full_like(cells[0], WHITE)] * (-len(cells) % COLUMNS)
    padded = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=WHITE) for cell in cells]
    return np.vstack(
        [np.hstack(padded[first : first + COLUMNS]) for first in range(0, len(padded), COLUMNS)]
    )


def draw_matching(name: str, cost: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 of costs (S, T) and of a change of the matching (G, S).

    Similar student channels are adjacent. The left panel has the cost of each pair, minus the means
    of its two channels. The teacher channels are in the order of their student channels, and the
    unmatched ones follow. So the matched pairs are on the diagonal: the darker, the smaller the
    cost. The right panel has a dot for each teacher channel: across its student channel before,
    down its student channel now.
    """
    S, T = cost.shape
    rest = cost - cost.mean(0) - cost.mean(1, keepdims=True) + cost.mean()
    # By the first principal component of the costs.
    students = np.linalg.eigh(rest @ rest.T).eigenvectors[:, -1].argsort()  # (S,)
    unmatched = np.setdiff1d(np.arange(T), after)
    teachers = np.concatenate([after[:, students].T.ravel(), unmatched])  # (T,)
    shown = sized(least(rest[np.ix_(students, teachers)], COSTS).astype(np.float32), COSTS)
    low, high = np.percentile(shown, [0.5, 99.5])
    costs = colours((255 * (shown - low) / max(high - low, 1e-12)).clip(0, 255).astype(np.uint8))

    # The row of each teacher channel's student channel, (T,), or -1.
    was, now = (np.full(T, -1) for _ in range(2))
    for row, matching in ((was, before), (now, after)):
        row[matching[:, students]] = np.arange(S)  # the same for all G rows
    both = (was >= 0) & (now >= 0)
    moved = np.zeros((S, S), bool)
    moved[now[both], was[both]] = True
    stayed = 100 * (was == now)[both].mean() if both.any() else 0
    titles = (
        (
            f"{name}: costs of {S} student channels (down), similar ones adjacent, and",
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
    """Return the panels (H, W, 3) and (H, W) of a matching with titles and a scale of colours.

    titles: two lines above each panel. ends: the costs at the ends of the scale.
    """
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
    draw.text((GAP, below), f"cost minus its channels' means: {ends[0]:.2f}", "black", font)
    canvas.paste(scale, (GAP + 230, below + 2))
    draw.text((GAP + 230 + 256 + GAP, below), f"{ends[1]:.2f}", "black", font)
    return np.asarray(canvas)


def least(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the minima of blocks of values (H, W), so that single pairs stay visible.

    size: (width, height). The result has less than twice as many values in each direction.
    """
    h, w = max(1, values.shape[0] // size[1]), max(1, values.shape[1] // size[0])
    H, W = values.shape[0] // h, values.shape[1] // w
    return values[: H * h, : W * w].reshape(H, h, W, w).min(axis=(1, 3))


def sized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return pixels (H, W) or (H, W, 3) resized to (width, height).

    Larger pictures are averaged. Each pixel of smaller ones becomes a rectangle.
    """
    larger = pixels.shape[1] > size[0] or pixels.shape[0] > size[1]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_NEAREST)


def dots(marks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return marks (S, S) as black dots of at least 2 pixels on white, (height, width) uint8."""
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
    """Return shades (H, W) uint8 as colours (H, W, 3). Larger ones are lighter, also in print."""
    return cv2.cvtColor(cv2.applyColorMap(shades, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
