"""What TensorBoard shows of a run besides its numbers: the distiller's distributions, augmented pairs, matchings."""

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from job.run.run import Run
from mgd.distiller import MGDistiller

PAIRS, COLUMNS = 8, 4
SIDE = 112  # pixels, of a view
COSTS, CHANGES = (512, 256), (256, 256)  # pixels, width and height of the panels of a matching
GAP, LINE = 8, 16  # pixels, between what is drawn, and of a line of text
WHITE = np.uint8(255)


def distiller(run: Run, epoch: int, mgd: MGDistiller) -> None:
    """Show the distributions of the margins and of each BN_i at the start of an epoch."""
    if not run.log.events:
        return
    for stage in mgd.stages:
        run.log.events.histogram(f"margins/layer{stage}", (epoch, 0), mgd.margin(stage).cpu().numpy())
        for name, value in mgd.get_submodule(f"bn{stage}").state_dict().items():
            if name != "num_batches_tracked":
                run.log.events.histogram(f"bn{stage}/{name}", (epoch, 0), value.cpu().numpy())


def pairs(run: Run, epoch: int, query: torch.Tensor, key: torch.Tensor) -> None:
    """Show the first views (B, 3, H, W) uint8 of an epoch, query beside key; in epochs 0, 1, 2, 4, 8, ..., as all are alike."""
    if run.log.events and epoch & (epoch - 1) == 0:
        run.log.events.picture("views/query beside key", (epoch, 0), draw_pairs(query[:PAIRS].cpu(), key[:PAIRS].cpu()))


def matching(run: Run, epoch: int, stage: int, cost: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    """Show a stage's costs (S, T) in the order of its new matching (G, S), and what has changed since the one before."""
    if run.log.events:
        picture = draw_matching(f"layer{stage}", cost.numpy(), before.numpy(), after.numpy())
        run.log.events.picture(f"matching/layer{stage}", (epoch, 0), picture)


def draw_pairs(query: torch.Tensor, key: torch.Tensor) -> np.ndarray:
    """A picture (H, W, 3) uint8 of views (n, 3, h, w) uint8: rows of `COLUMNS` pairs, in each the query and then the key."""
    cells = []
    for views in zip(query, key, strict=True):
        left, right = (sized(view.permute(1, 2, 0).numpy(), (SIDE, SIDE)) for view in views)
        cells.append(np.hstack([left, np.full((SIDE, 2, 3), WHITE), right]))
    cells += [np.full_like(cells[0], WHITE)] * (-len(cells) % COLUMNS)
    framed = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=WHITE) for cell in cells]
    return np.vstack([np.hstack(framed[first : first + COLUMNS]) for first in range(0, len(framed), COLUMNS)])


def draw_matching(name: str, cost: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a stage's costs (S, T), and of the change from one matching (G, S) to the next.

    On the left the cost of each pair, teacher channels in the order of the student channel that they are matched with, those
    of none at the end: matched pairs are the diagonal, the darker the nearer. On the right a dot for each teacher channel:
    its student channel before, across, and now, down; what has not changed lies on the diagonal.
    """
    S, T = cost.shape
    order = np.concatenate([after.T.ravel(), np.setdiff1d(np.arange(T), after)])
    shown = sized(cost[:, order].astype(np.float32), COSTS)
    low, high = np.percentile(shown, [0.5, 99.5])
    costs = colours((255 * (shown - low) / max(high - low, 1e-12)).clip(0, 255).astype(np.uint8))

    was, now = (np.full(T, -1) for _ in range(2))
    for owner, matched in ((was, before), (now, after)):
        owner[matched] = np.arange(S)  # broadcast over the G rows
    moved = np.zeros((S, S), bool)
    both = (was >= 0) & (now >= 0)
    moved[now[both], was[both]] = True
    changes = np.repeat(dots(moved, CHANGES)[..., None], 3, axis=2)

    canvas = Image.new("RGB", (COSTS[0] + CHANGES[0] + 5 * GAP, COSTS[1] + 4 * LINE + 2 * GAP), "white")
    draw, font, top, right = ImageDraw.Draw(canvas), ImageFont.load_default(13), 2 * LINE + GAP, COSTS[0] + 3 * GAP
    canvas.paste(Image.fromarray(costs), (GAP, top))
    canvas.paste(Image.fromarray(changes), (right, top))
    draw.rectangle((right - 1, top - 1, right + CHANGES[0], top + CHANGES[1]), outline="grey")
    draw.text((GAP, 4), f"{name}: cost of {S} student channels (down) with {T} teacher", "black", font)
    draw.text((GAP, 4 + LINE), "channels (across), in the order of their student channel", "black", font)
    stayed = 100 * (was == now)[both].mean() if both.any() else 0
    draw.text((right, 4), f"{stayed:.0f} % of teacher channels stay:", "black", font)
    draw.text((right, 4 + LINE), "student channel before (across), now (down)", "black", font)
    scale, below = colours(np.tile(np.arange(256, dtype=np.uint8), (LINE - 4, 1))), top + COSTS[1] + GAP
    draw.text((GAP, below), f"cost {low:.2f}", "black", font)
    canvas.paste(Image.fromarray(scale), (GAP + 80, below + 2))
    draw.text((GAP + 80 + 256 + GAP, below), f"{high:.2f}", "black", font)
    return np.asarray(canvas)


def sized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) at a size (width, height): averages where there are more, whole squares where fewer."""
    larger = pixels.shape[1] > size[0] or pixels.shape[0] > size[1]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_NEAREST)


def dots(marks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Marks (S, S) as black dots of at least 2 pixels on white, (height, width) uint8."""
    picture = np.full(size[::-1], WHITE)
    side = max(2, size[0] // len(marks))
    for y, x in np.argwhere(marks):
        y, x = y * (size[1] - side) // max(1, len(marks) - 1), x * (size[0] - side) // max(1, len(marks) - 1)
        picture[y : y + side, x : x + side] = 0
    return picture


def colours(shades: np.ndarray) -> np.ndarray:
    """Shades (H, W) uint8 as colours (H, W, 3), the lighter the larger, in print too."""
    return cv2.cvtColor(cv2.applyColorMap(shades, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
