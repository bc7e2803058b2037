"""Signs of collapse, and their warnings, for students that collapse and that learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from job.engine.run import Run
from job.frameworks.base import Output
from job.frameworks.moco import MoCoFramework
from job.metrics import collapse
from job.metrics.bounds import RANK, STD
from pictures import photo
from runs import Kept
from steps import build_training, train

DIM, B, K, SIDE = 16, 16, 64, 32


@pytest.fixture
def training(tmp_path):
    """A training of one worker. Its run keeps its records."""
    with Run(str(tmp_path / "run"), keep=1) as run:
        run.log = Kept()
        options = {"batch_size": B, "moco_dim": DIM, "moco_k": K, "lr": 0.004, "weight_decay": 0.0}
        yield build_training(run, tmp_path / "images", width=16, **options)


def steps(training, number):
    """Train for `number` steps on photographs."""
    images = [torch.from_numpy(photo(seed, 2 * SIDE, 2 * SIDE)) for seed in range(B)]
    images = torch.stack(images).permute(0, 3, 1, 2)  # (B, 3, 2 * SIDE, 2 * SIDE)
    random = torch.Generator().manual_seed(1)
    corners = torch.randint(SIDE, (number, 2, 2), generator=random).tolist()
    train(
        training, [[images[..., y : y + SIDE, x : x + SIDE] for y, x in both] for both in corners]
    )


def signs(training, queries):
    return training.framework.signs(Output({}, {"layer4": torch.ones(1, 1, 1, 1)}, queries, {}))


def ids(training):
    """Return the ids of all warnings."""
    return [record["id"] for record in training.run.log.of_kind("warning")]


def test_warnings_spare_student_that_learns(training):
    """Its keys, which lag behind, have filled the queue."""
    steps(training, 10)
    assert training.run.log.of_kind("collapse") and ids(training) == []


def test_warnings_of_constant_head(training):
    for encoder in (training.framework.module.encoder_q, training.framework.module.encoder_k):
        torch.nn.init.zeros_(encoder.get_parameter("fc.2.weight"))
        torch.nn.init.ones_(encoder.get_parameter("fc.2.bias"))
    steps(training, 6)
    [actual] = training.run.log.of_kind("collapse")
    assert actual["feature_std"] < STD and actual["queue_rank"] < RANK
    assert ids(training) == ["same_features", "queue_rank"]


def warnings(actual):
    return MoCoFramework.warnings(None, actual)


@pytest.mark.parametrize(
    ("sign", "bound", "id"),
    [("feature_std", STD, "same_features"), ("queue_rank", RANK, "queue_rank")],
)
def test_warning_has_sign_and_bound(sign, bound, id):
    healthy = {"feature_std": 1.0, "queue_rank": 9.0, "dead_layer4": 0.0}
    assert warnings(healthy | {sign: bound}) == {}
    [(actual, text)] = warnings(healthy | {sign: 0.9 * bound}).items()
    assert actual == id and f"{0.9 * bound:.2f}" in text and str(bound) in text


def test_dead_stages_are_one_warning():
    signs = {"feature_std": 1.0, "queue_rank": 9.0}
    signs |= {"dead_layer2": 0.5, "dead_layer3": 0.75, "dead_layer4": 0.6}
    [(actual, text)] = warnings(signs).items()
    assert actual == "dead_channels"
    assert all(phrase in text for phrase in ("75 % of layer3", "60 % of layer4"))
    assert "layer2" not in text


def test_warnings_of_dead_channels(training):
    training.framework.encoder.get_parameter("layer4.1.bn2.bias").data[:96] = -1e3  # of 128
    steps(training, 1)
    assert [record["dead_layer4"] for record in training.run.log.of_kind("collapse")] == [0.75]
    assert ids(training) == ["dead_channels"]


@pytest.mark.parametrize("directions", [1, 2, DIM])
def test_queue_rank_counts_directions(training, directions):
    training.framework.module.queue.copy_(torch.eye(DIM)[:, :directions].repeat(1, K // directions))
    assert math.isclose(signs(training, torch.eye(DIM))["queue_rank"], directions, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("features", "area"),
    [
        (torch.cat([torch.eye(8), -torch.eye(8)]), 9 / 16),  # all directions are equal
        (
            torch.cat([torch.eye(8), -torch.eye(8)]) @ torch.diag(torch.tensor([2.0] + 7 * [1.0])),
            0.5,
        ),
        (torch.linspace(3, 4, 20)[:, None] * torch.ones(8), 1.0),  # a line
        (torch.ones(20, 8), 1.0),  # a point
    ],
)
def test_spectrum_auc_of_known_spectra(features, area):
    if area == 0.5:  # by hand: 2 / 9, 3 / 9, ..., 9 / 9
        area = sum(range(2, 10)) / 9 / 8
    assert collapse.spectrum_auc(features) == pytest.approx(area, abs=1e-6)
    assert collapse.spectrum_auc(7 * features + 5) == pytest.approx(area, abs=1e-4)


def test_feature_std_on_sphere_is_one(training):
    queries = F.normalize(torch.randn(1000, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    assert abs(signs(training, queries)["feature_std"] - 1) < 0.02


def test_describe():
    line = collapse.describe(
        {"feature_std": 0.934, "queue_rank": 61.23, "dead_layer3": 0.0, "dead_layer4": 0.125}
    )
    expected = (
        "spread 0.93 (0: all alike, 1: even), rank of the queue 61.2, dead channels 0 % of layer3"
    )
    assert line == f"{expected}, 12 % of layer4"
