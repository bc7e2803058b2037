"""The distiller: its loss against slow loops, weights, factor, margins and state."""

import math

import pytest
import torch
from torch import nn

from mgd.assignment import assign
from mgd.distiller import MGDistiller
from mgd.margin import margin_from_bn
from mgd.reducers import REDUCERS

CHANNELS = {1: (2, 4), 2: (3, 7), 3: (4, 4), 4: (2, 9)}  # S does not divide T in stages 2 and 4
MAPS = {1: (6, 5), 2: (4, 4), 3: (2, 3), 4: (1, 1)}


def features(channels, B=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    student, teacher = (
        [
            2 * torch.randn(B, widths[i], *MAPS[stage], generator=random)
            for stage, widths in sorted(channels.items())
        ]
        for i in (0, 1)
    )
    return student, teacher


def loss_of(mgd, student, teacher, generator=None):
    """Return the loss of the features of student and teacher."""
    return mgd(student, mgd.targets(teacher, generator))


def distiller(channels=None, seed=0, **options):
    """Return a distiller with random margins and matchings.

    Its batch norms are random too, and have zero and negative weights.
    """
    channels = channels or CHANNELS
    random = torch.Generator().manual_seed(seed)
    mgd = MGDistiller(channels, **options)
    with torch.no_grad():
        for stage, (S, T) in channels.items():
            mgd.margin(stage).copy_(-2 * torch.rand(T, generator=random))
            matching = mgd.matching(stage)
            matching.copy_(assign(torch.rand(S, T, generator=random), matching.shape[0]))
            norm = mgd.get_submodule(f"bn{stage}")
            for values in (norm.weight, norm.bias, norm.running_mean):
                values.copy_(torch.randn(S, generator=random))
            norm.running_var.copy_(torch.rand(S, generator=random) + 0.5)
            norm.weight[0], norm.weight[1] = 0.0, -norm.weight[1].abs()
    return mgd


def normalised(features, a, norm):
    """Return channel a of the features through the batch norm, as nested lists of doubles."""
    maps = [image[a].flatten().tolist() for image in features]
    if norm.training:
        values = [v for m in maps for v in m]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
    else:
        mean, variance = norm.running_mean[a].item(), norm.running_var[a].item()
    w, b = norm.weight[a].item(), norm.bias[a].item()
    return [[w * (v - mean) / math.sqrt(variance + 1e-5) + b for v in m] for m in maps]


def slow_stage(student, target, margin, norm):
    loss = 0.0
    for a, m in enumerate(margin.tolist()):
        targets = [image[a].flatten().tolist() for image in target]
        for s_map, t_map in zip(normalised(student, a, norm), targets, strict=True):
            for s, t in zip(s_map, t_map, strict=True):
                t = max(t, m)
                loss += (s - t) ** 2 if s > t or t > 0 else 0.0
    return loss


def slow_loss(mgd, student, teacher, weights, factor, reducer="amp", generator=None):
    loss = 0.0
    for stage, s, t in zip(sorted(weights), student, teacher, strict=True):
        target, margin = REDUCERS[reducer](t, mgd.margin(stage), mgd.matching(stage), generator)
        loss += weights[stage] * slow_stage(s, target, margin, mgd.get_submodule(f"bn{stage}"))
    return loss / (len(student[0]) * factor)


WEIGHTS = {1: 1 / 8, 2: 1 / 4, 3: 1 / 2, 4: 1.0}


@pytest.mark.parametrize("reducer", ["amp", "rd", "sp", "sm"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("B", [2, 5])
def test_loss_is_weighted_sum_of_stages(reducer, training, B):
    mgd = distiller(reducer=reducer, factor=100.0).train(training)
    student, teacher = features(CHANNELS, B, seed=B)
    expected = slow_loss(
        mgd, student, teacher, WEIGHTS, 100.0, reducer, torch.Generator().manual_seed(3)
    )
    loss = loss_of(mgd, student, teacher, torch.Generator().manual_seed(3))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_loss_of_one_image():
    channels = {stage: CHANNELS[stage] for stage in (1, 2, 3)}
    student, teacher = features(channels, B=1)
    mgd = distiller(channels)
    expected = slow_loss(mgd, student, teacher, {stage: WEIGHTS[stage] for stage in channels}, 1e4)
    assert loss_of(mgd, student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_loss_of_zero_and_constant_channels():
    student, teacher = features(CHANNELS)
    for s, t in zip(student, teacher, strict=True):
        s[:, 0], s[:, 1], t[:, 0], t[:, 1] = 0.0, 0.7, 0.0, -0.4
    mgd = distiller()
    assert loss_of(mgd, student, teacher).item() == pytest.approx(
        slow_loss(mgd, student, teacher, WEIGHTS, 1e4), rel=1e-4
    )


@pytest.mark.parametrize("stages", [(4,), (1,), (2, 4), (3, 1), (4, 3, 2)])
def test_subset_of_stages_keeps_weights(stages):
    channels = {stage: CHANNELS[stage] for stage in stages}
    mgd, (student, teacher) = distiller(channels), features(channels)
    assert mgd.stages == sorted(stages)
    expected = slow_loss(mgd, student, teacher, {stage: WEIGHTS[stage] for stage in stages}, 1e4)
    assert loss_of(mgd, student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_weights_depend_on_depth():
    channels = {1: CHANNELS[1], 2: CHANNELS[2]}
    mgd, (student, teacher) = distiller(channels, depth=2), features(channels)
    expected = slow_loss(mgd, student, teacher, {1: 1 / 2, 2: 1.0}, 1e4)
    assert loss_of(mgd, student, teacher).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("given", [{4: 3.0}, {1: 0.0, 2: 0.3}, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}])
def test_given_weights_override(given):
    student, teacher = features(CHANNELS)
    mgd = distiller(weights=given)
    expected = slow_loss(mgd, student, teacher, WEIGHTS | given, 1e4)
    assert loss_of(mgd, student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_stage_of_zero_weight_has_no_gradient():
    student, teacher = features(CHANNELS)
    mgd = distiller(weights={2: 0.0})
    loss_of(mgd, [s.requires_grad_() for s in student], teacher).backward()
    assert [bool(s.grad.any()) for s in student] == [True, False, True, True]


def test_factor_can_be_set_in_place():
    student, teacher = features(CHANNELS)
    mgd = distiller(factor=100.0)
    before = loss_of(mgd, student, teacher)
    mgd.factor.fill_(50.0)
    assert torch.equal(loss_of(mgd, student, teacher), 2 * before)
    assert before.dtype == torch.float32


@pytest.mark.parametrize("factor", [1.0, 100.0, 1e4])
def test_factor_divides_loss(factor):
    student, teacher = features(CHANNELS)
    loss = loss_of(distiller(factor=factor), student, teacher)
    torch.testing.assert_close(
        loss * factor, loss_of(distiller(factor=1.0), student, teacher), rtol=1e-5, atol=0
    )


def test_defaults():
    mgd = MGDistiller(CHANNELS)
    assert (mgd.factor, mgd.reducer, mgd.weights) == (1e4, "amp", WEIGHTS)


def test_loss_is_mean_over_images():
    student, teacher = features(CHANNELS)
    twice = ([torch.cat([f, f]) for f in maps] for maps in (student, teacher))
    torch.testing.assert_close(
        loss_of(distiller(), *twice), loss_of(distiller(), student, teacher), rtol=1e-5, atol=0
    )


def test_random_drop_uses_generator():
    student, teacher = features(CHANNELS)
    mgd = distiller(reducer="rd")
    losses = [
        loss_of(mgd, student, teacher, torch.Generator().manual_seed(seed)).item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_gradient_reaches_student_and_norms():
    student, teacher = ([f.requires_grad_() for f in maps] for maps in features(CHANNELS))
    mgd = distiller()
    loss_of(mgd, student, teacher).backward()
    assert all(t.grad is None for t in teacher)
    assert all(s.grad.abs().sum() > 0 for s in student)
    assert [name for name, _ in mgd.named_parameters()] == [
        f"bn{stage}.{x}" for stage in CHANNELS for x in ("weight", "bias")
    ]
    assert all(p.grad.abs().sum() > 0 for p in mgd.parameters())


def test_gradient_equals_finite_differences():
    channels = {3: (2, 4)}
    (student,), (teacher,) = features(channels, B=2)
    mgd = distiller(channels, factor=1.0)
    student.requires_grad_()
    loss_of(mgd, [student], [teacher]).backward()
    values, numeric = student.detach().double(), torch.zeros_like(student)
    for i in range(values.numel()):
        steps = []
        for step in (1e-5, -1e-5):
            moved = values.clone()
            moved.view(-1)[i] += step
            steps.append(slow_loss(mgd, [moved], [teacher], {3: 0.5}, 1.0))
        numeric.view(-1)[i] = (steps[0] - steps[1]) / 2e-5
    assert numeric.abs().max() > 0.1
    torch.testing.assert_close(student.grad, numeric, rtol=1e-3, atol=1e-4)


def test_load_margins_uses_norms():
    random = torch.Generator().manual_seed(0)
    norms = {stage: nn.BatchNorm2d(T) for stage, (_, T) in CHANNELS.items()}
    for norm in norms.values():
        nn.init.normal_(norm.weight, generator=random)
        nn.init.normal_(norm.bias, generator=random)
        norm.weight.data[0] = 0.0
    mgd = MGDistiller(CHANNELS)
    mgd.load_margins(norms)
    for stage, norm in norms.items():
        assert torch.equal(mgd.margin(stage), margin_from_bn(norm.weight, norm.bias).detach())
        assert not mgd.margin(stage).requires_grad


def test_margins_start_as_half_normal_mean():
    mgd = MGDistiller(CHANNELS)
    for stage, (_, T) in CHANNELS.items():
        torch.testing.assert_close(mgd.margin(stage), torch.full((T,), -math.sqrt(2 / math.pi)))


@pytest.mark.parametrize(("reducer", "groups"), [("amp", [2, 2, 1, 4]), ("sm", [1, 1, 1, 1])])
def test_new_matching_uses_each_channel_once(reducer, groups):
    mgd = MGDistiller(CHANNELS, reducer=reducer)
    for (stage, (S, T)), G in zip(CHANNELS.items(), groups, strict=True):
        channels = mgd.matching(stage).flatten().tolist()
        assert mgd.matching(stage).shape == (G, S)
        assert mgd.matching(stage).dtype == torch.int64
        assert len(set(channels)) == len(channels)
        assert set(channels) <= set(range(T))


def test_state_is_saved_and_restored():
    saved, restored = distiller(seed=1, factor=1 / 3), MGDistiller(CHANNELS)
    state = saved.state_dict()
    assert state["factor"].dtype == torch.float64 and state["factor"].item() == 1 / 3
    for stage in CHANNELS:
        assert torch.equal(state[f"margin{stage}"], saved.margin(stage))
        assert torch.equal(state[f"matching{stage}"], saved.matching(stage))
    restored.load_state_dict(state)
    for stage in CHANNELS:
        assert torch.equal(restored.margin(stage), saved.margin(stage))
        assert torch.equal(restored.matching(stage), saved.matching(stage))
    student, teacher = features(CHANNELS)
    assert torch.equal(loss_of(restored, student, teacher), loss_of(saved, student, teacher))


def test_state_names():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{buffer}{stage}" for buffer in ("margin", "matching") for stage in (2, 4)}
    names |= {f"bn{stage}.{x}" for stage in (2, 4) for x in norm} | {"factor"}
    assert set(MGDistiller({2: (3, 7), 4: (2, 9)}).state_dict()) == names


def test_matching_can_be_set_in_place():
    channels = {3: (1, 2)}
    (student,), (teacher,) = features(channels)
    mgd = MGDistiller(channels, reducer="sm")
    before = loss_of(mgd, [student], [teacher])
    mgd.matching(3).fill_(1)
    assert torch.equal(loss_of(mgd, [student], [teacher.flip(1)]), before)
    assert not torch.equal(loss_of(mgd, [student], [teacher]), before)


def test_distiller_refuses_unknown_reducer():
    with pytest.raises(ValueError, match="'max': unknown; expected one of amp, rd, sp, sm"):
        MGDistiller(CHANNELS, reducer="max")


@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_distiller_refuses_narrow_teacher(reducer):
    with pytest.raises(
        ValueError, match="stage 2: a teacher of 3 channels has too few for a student of 4"
    ):
        MGDistiller({1: (2, 4), 2: (4, 3)}, reducer=reducer)


@pytest.mark.parametrize(("students", "teachers"), [(3, 4), (4, 3), (3, 3)])
def test_loss_refuses_missing_stage(students, teachers):
    student, teacher = features(CHANNELS)
    with pytest.raises(ValueError, match="zip"):
        loss_of(distiller(), student[:students], teacher[:teachers])
