"""TensorBoard's histograms and pictures of views and matchings."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from job.metrics import tensorboard
from mgd.assignment import assign
from job.distill.mgd import MGD
from mgd.distiller import MGDistiller


class Shown:
    """Events that keep their histograms and pictures."""

    def __init__(self):
        self.histograms, self.pictures = {}, {}

    def histogram(self, tag, position, values):
        self.histograms[tag, position] = values

    def picture(self, tag, position, pixels):
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        self.pictures[tag, position] = pixels


@pytest.fixture
def run():
    return SimpleNamespace(log=SimpleNamespace(events=Shown()))


# Another rank, or a run without --tensorboard.
SILENT = SimpleNamespace(log=SimpleNamespace(events=None))


def grey(pixels):
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(float)


def views(n, side, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    )


def test_histograms_of_margins_and_norms(run):
    mgd = MGDistiller({1: (4, 8), 3: (6, 6)})
    nn.init.uniform_(mgd.bn3.weight)
    distiller = object.__new__(MGD)
    distiller.module = mgd
    tensorboard.histograms(run.log, 5, distiller.histograms())
    names = ("weight", "bias", "running_mean", "running_var")
    expected = {f"bn{stage}/{name}" for stage in (1, 3) for name in names} | {
        "margins/layer1",
        "margins/layer3",
    }
    assert {tag for tag, _ in run.log.events.histograms} == expected
    assert {position for _, position in run.log.events.histograms} == {(5, 0)}
    assert np.array_equal(
        run.log.events.histograms["bn3/weight", (5, 0)], mgd.bn3.weight.detach().numpy()
    )
    assert np.array_equal(
        run.log.events.histograms["margins/layer1", (5, 0)], mgd.margin(1).numpy()
    )


@pytest.mark.parametrize("number", [1, 2])
def test_views_are_drawn_in_few_epochs(run, number):
    for epoch in range(20):
        tensorboard.views(run.log, "random", epoch, [views(9, 32, seed) for seed in range(number)])
    assert list(run.log.events.pictures) == [
        ("views/random", (epoch, 0)) for epoch in (0, 1, 2, 4, 8, 16)
    ]


def test_silent_log_draws_no_pictures():
    tensorboard.histograms(SILENT.log, 0, {})
    tensorboard.views(SILENT.log, "random", 0, None)
    tensorboard.matching(SILENT.log, "mgd", 0, 1, None, None, None)


@pytest.mark.parametrize("side", [28, 56, 112])
def test_draw_views_puts_pairs_side_by_side(side):
    """Each pixel of a small view becomes a square."""
    query, key = views(8, side), views(8, side, seed=1)
    picture, times = tensorboard.draw_views([query, key]), tensorboard.SIDE // side
    height, width = tensorboard.SIDE + tensorboard.GAP, 2 * tensorboard.SIDE + 2 + tensorboard.GAP
    assert picture.shape == (2 * height, 4 * width, 3)
    for position in range(8):
        y, x = position // 4 * height, position % 4 * width
        for view, left in ((query[position], x), (key[position], x + tensorboard.SIDE + 2)):
            enlarged = view.permute(1, 2, 0).numpy().repeat(times, 0).repeat(times, 1)
            assert np.array_equal(
                picture[y : y + tensorboard.SIDE, left : left + tensorboard.SIDE], enlarged
            )


def test_draw_views_of_single_views():
    side, single = tensorboard.SIDE, views(8, tensorboard.SIDE)
    picture, position = tensorboard.draw_views([single]), side + tensorboard.GAP
    assert picture.shape == (2 * position, 4 * position, 3)
    assert np.array_equal(picture[:side, :side], single[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (4, 1), (5, 2)])
def test_draw_views_of_few_large_views(n, rows):
    picture = tensorboard.draw_views([views(n, 224), views(n, 224, seed=1)])
    assert picture.shape[0] == rows * (tensorboard.SIDE + tensorboard.GAP)
    assert abs(picture[: tensorboard.SIDE, : tensorboard.SIDE].mean() - 127.5) < 3  # averages


def channels(S, T, noise=0.0, seed=0):
    """Return costs (S, T): each teacher channel has one student channel of clearly least cost."""
    random = np.random.default_rng(seed)
    owners = random.permutation(np.arange(T) % S)
    cost = random.uniform(1.0, 2.0, (S, T))
    cost[owners, np.arange(T)] = 0.2
    return torch.from_numpy(cost + noise * random.random((S, T)))


def panel(picture, left, size):
    top = 2 * tensorboard.LINE + tensorboard.GAP
    return grey(picture)[top : top + size[1], left : left + size[0]]


@pytest.mark.parametrize(("S", "T"), [(64, 256), (512, 2048), (64, 64), (100, 470)])
def test_draw_matching_has_dark_diagonal(S, T):
    cost = channels(S, T)
    matching = assign(cost, T // S)
    costs = panel(
        tensorboard.draw_matching("layer1", cost.numpy(), matching.numpy(), matching.numpy()),
        tensorboard.GAP,
        tensorboard.COSTS,
    )
    width, height = tensorboard.COSTS
    matched = width * (T // S * S) // T  # unmatched channels are at the end
    across = np.arange(matched)
    diagonal = costs[(across + 0.5).astype(int) * height // matched, across].mean()
    assert diagonal < 0.6 * np.median(costs)
    assert costs.std() > 10


def moves(picture, S):
    """Return the drawn changes: student channels (now, before) of teacher channels, (S, S) bool."""
    changes = panel(picture, tensorboard.COSTS[0] + 3 * tensorboard.GAP, tensorboard.CHANGES) == 0
    return (
        changes.reshape(S, tensorboard.CHANGES[1] // S, S, tensorboard.CHANGES[0] // S).mean(
            axis=(1, 3)
        )
        > 0.5
    )


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_draw_matching_shows_moved_channels(moved):
    S, T = 8, 16
    before = torch.arange(T).view(2, S)
    after = before.clone()
    if moved:
        after[0, [0, 5]] = after[0, [5, 0]]
    if moved == 2:
        after[1, [1, 2]] = after[1, [2, 1]]
    distances = np.arange(S) - (S - 1) / 2
    cost = (
        -distances[:, None] * distances[np.arange(T) % S]
    )  # puts the student channels in their own order, or the reverse
    picture = tensorboard.draw_matching("layer1", cost, before.numpy(), after.numpy())
    cells = moves(picture, S)
    expected = np.eye(S, dtype=bool)  # each keeps at least one of its two
    for a, b in [(0, 5), (1, 2)][:moved]:
        expected[a, b] = expected[b, a] = True
    assert np.array_equal(cells, expected) or np.array_equal(cells, expected[::-1, ::-1])


def test_draw_matching_of_equal_costs():
    matching = np.arange(4).reshape(1, 4)
    picture = tensorboard.draw_matching("layer1", np.ones((4, 4)), matching, matching)
    assert panel(picture, tensorboard.GAP, tensorboard.COSTS).std() == 0
    assert np.array_equal(moves(picture, 4), np.eye(4))
