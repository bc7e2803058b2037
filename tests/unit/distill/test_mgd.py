"""The adapter of MGD: the correction, pooled features, refreshes and random matching."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distillers import check_gradient
from job.config import Config
from job.data.randomness import permutation
from job.distill import mgd as module
from job.distill.mgd import FIXED_POINT, MGD, measure, prepare_refresh
from job.errors import RunError
from mgd.assignment import assign
from mgd.cost import channel_cost
from mgd.pooled import pooled_cost, pooled_sums
from runs import Kept

WIDTHS = {1: 2, 2: 3, 3: 3, 4: 3}
TEACHER = {1: 5, 2: 6, 3: 7, 4: 8}
PLAIN = {"factor", *(f"{name}{stage}" for name in ("margin", "matching") for stage in (1, 4))}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PLAIN |= {f"bn{stage}.{name}" for stage in (1, 4) for name in NORM}
IMAGES, BATCH = 10, 3


def build(widths=TEACHER, **options):
    options = {
        "mgd_stages": [1, 4],
        "loss_share": 0.0,
        "loss_factor": 10.0,
        "teacher": "t.pth",
        **options,
    }
    norms = {stage: nn.BatchNorm2d(T) for stage, T in widths.items()}
    return MGD(
        Config(**options), WIDTHS, SimpleNamespace(norms=norms, widths=widths, shown="a net")
    )


def features(widths, images=IMAGES, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": torch.randn(images, C, 6 - i, 6 - i, generator=random)
        for i, C in widths.items()
    }


def student(images=IMAGES):
    return features(WIDTHS, images)


def teacher(images=IMAGES):
    return features(TEACHER, images, seed=1)


def test_state_without_options():
    distiller = build()
    assert set(distiller.module.state_dict()) == PLAIN
    assert distiller.stages(distiller.config) == [1, 4]
    maps, vectors = distiller.targets(teacher(), torch.Generator())
    assert vectors is None
    expected = distiller.module([student()["layer1"], student()["layer4"]], maps)
    assert torch.equal(distiller.loss(student(), (maps, vectors)), expected)


def test_state_with_options():
    distiller = build(mgd_correction=True, mgd_pooled=2.0)
    added = {
        "correction1.weight",
        "correction4.weight",
        "pooled.matching",
        *(f"pooled.bn.{name}" for name in NORM),
    }
    assert set(distiller.module.state_dict()) == PLAIN | added
    assert {"correction1", "correction4", "pooled/weight", "pooled/running_var"} <= set(
        distiller.histograms()
    )


def test_new_correction_does_not_change_loss():
    losses = []
    for distiller in (build(), build(mgd_correction=True)):
        losses.append(distiller.loss(student(), distiller.targets(teacher(), torch.Generator())))
    assert torch.equal(*losses)


def test_pooled_loss_is_added_by_weight():
    """It is added even if the last stage's maps are not distilled."""
    for stages in ([1, 4], [1]):
        distiller, plain = build(mgd_pooled=3.0, mgd_stages=stages), build(mgd_stages=stages)
        assert distiller.stages(distiller.config) == [1, 4]
        actual = distiller.loss(student(), distiller.targets(teacher(), torch.Generator()))
        expected = plain.loss(student(), plain.targets(teacher(), torch.Generator()))
        pooled = copy.deepcopy(distiller.pooled)
        distance = pooled(student()["layer4"], pooled.target(teacher()["layer4"]))
        torch.testing.assert_close(
            actual, expected + 3.0 * distance / (IMAGES * 10.0), rtol=1e-5, atol=0
        )
        assert actual.dtype == torch.float32


def test_gradient_of_sum_is_its_slope():
    distiller = build(mgd_correction=True, mgd_pooled=3.0, mgd_stages=[4])
    with torch.no_grad():
        nn.init.normal_(distiller.module.get_parameter("correction4.weight"))
    targets, maps = distiller.targets(teacher(), torch.Generator()), student()
    maps["layer4"].requires_grad_()
    distiller.loss(maps, targets).backward()
    exact = copy.deepcopy(distiller)
    exact.module.double()
    vectors = targets[1].double()

    def slow(values):
        s = torch.from_numpy(values)
        x = exact.module.get_submodule("bn4")(s + torch.einsum("ac,bchw->bahw", exact.W, s))
        [(t, margin)] = targets[0]
        t = torch.maximum(t.double(), margin.double()[:, None, None])
        distance = ((x - t) ** 2)[(x > t) | (t > 0)].sum()
        return ((distance + 3.0 * pooled_loss(exact.pooled, s, vectors)) / (IMAGES * 10.0)).item()

    exact.W = exact.module.get_parameter("correction4.weight").detach()[:, :, 0, 0]
    check_gradient(maps["layer4"], slow)


def pooled_loss(pooled, s, v):
    """Return the pooled loss in float64."""
    y = pooled.bn(s.relu().mean((2, 3))[:, :, None, None]).flatten(1)
    return s[0].numel() * (y / y.norm(dim=1, keepdim=True) - v).square().sum()


class Run:
    """The fields of a run that a refresh needs."""

    device, rank, size = torch.device("cpu"), 0, 1

    def __init__(self):
        self.log = Kept()

    def autocast(self, precision):
        return torch.autocast("cpu", enabled=False)

    def total(self, **counts):
        return {name: int(value) for name, value in counts.items()}


class Net(nn.Module):
    """A network that looks up its features by the numbers of images."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, numbers):
        return {name: maps[numbers] for name, maps in self.maps.items()}


@pytest.fixture
def networks(monkeypatch):
    """Networks of IMAGES images. Each worker measures every `size`-th batch of numbers."""

    def crops(images, sample, batch, config, run, name):
        batches = [
            torch.tensor(sample[first : first + BATCH]) for first in range(0, len(sample), BATCH)
        ]
        return [(numbers, None) for numbers in batches[run.rank :: run.size]]

    monkeypatch.setattr(module, "centre_crops", crops)
    monkeypatch.setattr(module.comm, "total", lambda values, name: values)
    monkeypatch.setattr(module.comm, "broadcast", lambda values, name: values)
    framework = SimpleNamespace(encoder=Net(student()))
    nets = SimpleNamespace(net=Net(teacher()))
    return SimpleNamespace(run=Run(), images=range(IMAGES), framework=framework, teacher=nets)


def corrected():
    """Return a distiller with both options and a trained correction."""
    distiller = build(mgd_correction=True, mgd_pooled=1.0)
    with torch.no_grad():
        for stage in (1, 4):
            weight = distiller.module.get_parameter(f"correction{stage}.weight")
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(stage)))
    return distiller


def test_refresh_solves_corrected_and_pooled(networks):
    distiller = corrected()
    change = prepare_refresh(distiller, 0, networks)
    assert set(change.state) == {"matching1", "matching4", "pooled.matching"}
    s, t = student(), teacher()
    for stage in (1, 4):
        maps, W = (
            s[f"layer{stage}"],
            distiller.module.get_parameter(f"correction{stage}.weight").detach(),
        )
        moved = maps + torch.einsum("ac,bchw->bahw", W[:, :, 0, 0], maps)
        assert torch.equal(
            change.state[f"matching{stage}"], assign(channel_cost(moved, t[f"layer{stage}"]))
        )
    assert torch.equal(
        change.state["pooled.matching"], assign(pooled_cost(pooled_sums(s["layer4"], t["layer4"])))
    )
    change.record()
    distiller.apply(change)
    assert torch.equal(distiller.pooled.matching, change.state["pooled.matching"])
    [line] = [line for line in networks.run.log.lines if "pooled" in line]
    assert line.startswith("  pooled: matching 2x3 of 8, cost ")
    assert [record["stage"] for record in networks.run.log.records] == [1, 4]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_measure_is_equal_for_any_workers(networks, size):
    """The sums are in fixed point, so their order does not matter."""
    distiller, sample = corrected(), list(range(IMAGES))
    expected_sums = measure(distiller, networks, sample)
    by_worker = []
    networks.run.size = size
    for networks.run.rank in range(size):
        by_worker.append(measure(distiller, networks, sample))
    for stage, expected in expected_sums.items():
        assert expected.dtype == torch.int64
        assert torch.equal(sum(sums[stage] for sums in reversed(by_worker)), expected)
    assert expected_sums["pooled"][3, 8] == IMAGES * FIXED_POINT


def test_measure_refuses_features_not_finite(networks):
    networks.framework.encoder.maps["layer4"][2] = np.inf
    with pytest.raises(RunError, match="cannot solve the matching: features .* are not finite"):
        measure(build(mgd_pooled=1.0, mgd_stages=[1]), networks, list(range(IMAGES)))


def test_random_pooled_matching_is_from_seed():
    one, other = (
        build(mgd_pooled=1.0, matching="random", seed=seed).pooled.matching for seed in (5, 6)
    )
    expected = permutation(8, 5, "matching", sample=0)[:6].reshape(2, 3)
    assert torch.equal(one, torch.from_numpy(expected))
    assert not torch.equal(one, other)


def test_sparse_pooled_matching_has_one_group():
    assert build(mgd_pooled=1.0, reducer="sm").pooled.matching.shape == (1, 3)


def test_mgd_refuses_narrow_teacher():
    with pytest.raises(RunError) as error:
        build(TEACHER | {4: 2}, mgd_pooled=1.0, mgd_stages=[1])
    assert str(error.value).startswith("--teacher t.pth (a net) for -a resnet18")
    assert str(error.value).endswith(
        "pooled features: a teacher of 2 channels has too few for a student of 3"
    )
