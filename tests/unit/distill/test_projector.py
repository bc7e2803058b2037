"""The projector: loss against a slow loop, gradients, and maps at the limits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from errors import refused
from job.config import Config
from job.distill.projector import EPS, Projector, Regression
from maps import draw
from mgd import blocks

WIDTHS, CHANNELS, SIDES = {1: 3, 4: 5}, {1: 4, 4: 12}, {1: 6, 4: 2}
STAGES = [1, 4]


def new(stages=STAGES, **options):
    """Return a projector whose batch norms have random scales."""
    torch.manual_seed(0)
    teacher = SimpleNamespace(widths=CHANNELS)
    options = {"loss_factor": 1.0, "teacher": "t.pth", "projector_stages": stages, **options}
    distiller = Projector(Config(**options), WIDTHS, teacher)
    for stage in stages:
        nn.init.normal_(distiller.module.get_submodule(f"stage{stage}").scale)
    return distiller


def loss(distiller, student, teacher):
    return distiller.loss(student, distiller.targets(teacher, torch.Generator()))


def standardised(channel):
    """Return a channel with mean 0 and variance 1 over all images and positions."""
    return (channel - channel.mean()) / np.sqrt(channel.var() + EPS)


def plainly(distiller, student, teacher):
    """Return the loss in float64, channel by channel."""
    actual = []
    for name, s in student.items():
        s, t = s.numpy().astype(np.float64), teacher[name].numpy().astype(np.float64)
        state = distiller.module.get_submodule(name.replace("layer", "stage")).state_dict()
        weight, scale = (state[key].numpy().astype(np.float64) for key in ("weight", "scale"))
        squares = []
        for channel in range(t.shape[1]):
            projected = sum(weight[channel, a] * s[:, a] for a in range(s.shape[1]))  # (b, H, W)
            error = scale[channel] * standardised(projected) - standardised(t[:, channel])
            squares.append((error**2).mean())
        actual.append(np.mean(squares))
    return np.mean(actual)


@pytest.mark.parametrize("stages", [[1, 4], [4]])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_loss_equals_formula(stages, factor):
    student = draw(WIDTHS, SIDES, stages, mean=2.0)
    teacher = draw(CHANNELS, SIDES, stages, mean=5.0)
    distiller = new(stages, loss_factor=factor)
    expected = plainly(distiller, student, teacher) / factor
    assert loss(distiller, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("numbers", [1, 9, 2**18])
def test_regression_gradients_are_exact(numbers, monkeypatch):
    """Also in blocks of one and two positions."""
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    regression = Regression(3, 4).double()
    s, t = (torch.randn(7, width, dtype=torch.float64) for width in (3, 4))

    def distance(features, weight, scale):
        values = {"weight": weight, "scale": scale}
        return torch.func.functional_call(regression, values, (features, t))

    inputs = (s.requires_grad_(), regression.weight, regression.scale)
    assert torch.autograd.gradcheck(distance, inputs)


def autograd(regression, features, targets):
    """Return the loss of standardised targets by torch's own batch norm and convolution."""
    projected = F.linear(features, regression.weight)
    ours = F.batch_norm(projected, None, None, regression.scale, training=True, eps=EPS)
    theirs = F.batch_norm(targets, None, None, training=True, eps=EPS)
    return (ours - theirs).square().mean()


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_regression_differs_from_layers_by_rounding(offset, monkeypatch):
    """Blocks of 20 positions, and channels whose mean is up to 3 deviations away from 0."""
    monkeypatch.setattr(blocks, "NUMBERS", 20 * 24)
    torch.manual_seed(0)
    regression = Regression(8, 24)
    nn.init.normal_(regression.scale)
    features = (torch.randn(1000, 8) + offset).requires_grad_()
    targets = torch.randn(1000, 24) + features.detach().repeat(1, 3) - offset
    inputs = (features, *regression.parameters())
    expected, actual = autograd(regression, features, targets), regression(features, targets)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = (torch.autograd.grad(each, inputs) for each in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_gradients_reach_student_and_projector():
    distiller = new()
    student = {name: maps.requires_grad_() for name, maps in draw(WIDTHS, SIDES, STAGES).items()}
    teacher = {name: maps.requires_grad_() for name, maps in draw(CHANNELS, SIDES, STAGES).items()}
    with torch.no_grad():
        targets = distiller.targets(teacher, torch.Generator())
    distiller.loss(student, targets).backward()
    trained = [*student.values(), *distiller.module.parameters()]
    assert len(trained) == 2 + 4 and all(value.grad.abs().sum() > 0 for value in trained)
    assert all(maps.grad is None for maps in teacher.values())


def test_loss_ignores_scale_of_teacher_channels():
    student, teacher = draw(WIDTHS, SIDES, STAGES), draw(CHANNELS, SIDES, STAGES)
    distiller = new()
    expected = loss(distiller, student, teacher).item()
    scales = {name: torch.linspace(1, 50, maps.shape[1]) for name, maps in teacher.items()}
    other = {name: scales[name].view(-1, 1, 1) * maps - 3 for name, maps in teacher.items()}
    assert loss(distiller, student, other).item() == pytest.approx(expected, rel=1e-4)


def equal(distiller, stage, S):
    """Set a stage's projector to the identity."""
    regression = distiller.module.get_submodule(f"stage{stage}")
    with torch.no_grad():
        regression.weight.copy_(torch.eye(len(regression.weight), S))
        regression.scale.fill_(1.0)


def test_equal_maps_have_no_loss(monkeypatch):
    monkeypatch.setitem(CHANNELS, 4, WIDTHS[4])
    distiller = new([4])
    equal(distiller, 4, WIDTHS[4])
    maps = draw(WIDTHS, SIDES, [4])
    assert abs(loss(distiller, maps, maps).item()) < 1e-6


@pytest.mark.parametrize("student", [0.0, 1e-8, 3.0])
@pytest.mark.parametrize("teacher", [0.0, 3.0])
def test_constant_maps_have_finite_gradients(student, teacher):
    """A constant channel of the teacher contributes no gradient."""
    distiller = new([4])
    s = torch.full_like(draw(WIDTHS, SIDES, [4])["layer4"], student, requires_grad=True)
    maps = draw(CHANNELS, SIDES, [4])
    maps["layer4"][:, 1:] = teacher
    actual = loss(distiller, {"layer4": s}, maps)
    actual.backward()
    assert actual.item() == pytest.approx(1 / CHANNELS[4], rel=1e-3)  # channel 0's variance
    values = [s.grad, *(value.grad for value in distiller.module.parameters())]
    assert all(value.isfinite().all() for value in values)


def test_loss_of_one_position_equals_formula():
    student, teacher = draw(WIDTHS, {4: 1}, [4]), draw(CHANNELS, {4: 1}, [4])
    distiller = new([4])
    expected = plainly(distiller, student, teacher)
    assert loss(distiller, student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_float32_under_autocast():
    student, teacher = draw(WIDTHS, SIDES, STAGES), draw(CHANNELS, SIDES, STAGES)
    distiller = new()
    expected = loss(distiller, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(distiller, student, teacher), expected)


def test_bfloat16_targets_count_as_float32():
    student, teacher = draw(WIDTHS, SIDES, STAGES), draw(CHANNELS, SIDES, STAGES)
    rounded = {name: maps.bfloat16() for name, maps in teacher.items()}
    exact = {name: maps.float() for name, maps in rounded.items()}
    distiller = new()
    expected = loss(distiller, student, exact).item()
    assert loss(distiller, student, rounded).item() == pytest.approx(expected, rel=1e-6)


def test_loss_refuses_other_map_size():
    student, teacher = draw(WIDTHS, {4: 3}, [4]), draw(CHANNELS, {4: 2}, [4])
    message = refused(loss, new([4]), student, teacher)
    expected = "--teacher t.pth: the maps of layer4 have 2 x 1 positions; expected 3 x 2"
    assert message.startswith(expected)


def test_projector_has_weights_for_each_stage():
    """They depend only on the seed."""
    state = new().module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    stages = {f"stage{i}.weight": (CHANNELS[i], WIDTHS[i]) for i in STAGES}
    stages |= {f"stage{i}.scale": (CHANNELS[i],) for i in STAGES}
    assert shapes == {"factor": (), **stages}
    assert all(torch.equal(value, state[name]) for name, value in new().module.state_dict().items())
