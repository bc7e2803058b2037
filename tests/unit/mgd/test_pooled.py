"""Matching of pooled features: cost and loss against slow loops."""

import math

import numpy as np
import pytest
import torch

from mgd.assignment import assign
from mgd.pooled import PooledMatching, pooled_cost, pooled_sums

S, T, B = 3, 7, 5


def draw(channels, images=B, seed=0, sides=(4, 3)):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, *sides, generator=random)


def array(tensor):
    return tensor.detach().double().numpy()


def by_image(maps):
    """Return pooled features by loops, (images, C)."""
    return np.array([[np.maximum(channel, 0).mean() for channel in image] for image in array(maps)])


def unit(vector):
    length = math.sqrt((vector * vector).sum())
    return vector / length if length else vector


def slow_cost(student, teacher):
    """Return the mean squared distance of standardised channels, channel by channel."""

    def channels(maps):
        vectors = np.array([unit(vector) for vector in by_image(maps)]).T  # (C, images)
        return [(c - c.mean()) / c.std() if c.std() > 1e-9 else 0 * c for c in vectors]

    return np.array([[np.mean((a - b) ** 2) for b in channels(teacher)] for a in channels(student)])


def cost(student, teacher):
    return pooled_cost(pooled_sums(student, teacher))


@pytest.mark.parametrize("images", [2, 5, 40])
def test_cost_equals_slow_loop(images):
    student, teacher = draw(S, images), 3 * draw(T, images, seed=1)
    actual = cost(student, teacher)
    assert actual.shape == (S, T) and actual.dtype == torch.float64
    np.testing.assert_allclose(actual, slow_cost(student, teacher), rtol=1e-4, atol=1e-5)


def test_cost_of_constant_channels():
    """Some channels are silent in all images, and one image is silent in the teacher."""
    student, teacher = draw(S), draw(T, seed=1)
    student[:, 0], teacher[:, :2], teacher[3] = -1.0, -2.0, -1.0
    actual = cost(student, teacher)
    np.testing.assert_allclose(actual, slow_cost(student, teacher), rtol=1e-4, atol=1e-5)
    assert actual[0].tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1])
    assert actual[1:, :2].flatten().tolist() == pytest.approx([1] * 4)


def test_cost_of_nearly_constant_channels():
    """Rounding makes their variance positive."""
    lengths = torch.rand(40, 1, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    actual = cost(lengths.expand(40, 3, 2, 2), draw(T, images=40, seed=1))
    assert actual.flatten().tolist() == pytest.approx([1.0] * 3 * T)


def test_sums_of_batches_add_up():
    student, teacher = draw(S, 9), draw(T, 9, seed=1)
    sums = pooled_sums(student[:4], teacher[:4]) + pooled_sums(student[4:], teacher[4:])
    assert sums[S, T] == 9
    torch.testing.assert_close(pooled_cost(sums / 9), cost(student, teacher), rtol=1e-9, atol=1e-9)


def test_sums_of_image_are_at_most_one():
    assert pooled_sums(1e4 * draw(S), 1e-4 * draw(T)).abs().max() == B


def test_cost_of_scaled_channel_is_least():
    """A further large channel gives all vectors nearly the same length."""
    g = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    order, scale = torch.tensor([2, 0, 3, 1]), torch.tensor([0.5, 2.0, 1.0, 3.0])
    rest = torch.full((50, 1), 100.0)
    student = torch.cat([g, rest], 1)[:, :, None, None]
    teacher = torch.cat([scale * g[:, order], rest], 1)[:, :, None, None]
    actual = cost(student, teacher)[:4, :4]
    assert torch.equal(order[assign(actual)[0]], torch.arange(4))
    assert actual.amin(1).tolist() == pytest.approx([0] * 4, abs=1e-3)


def test_cost_has_no_gradient():
    assert not cost(draw(S).requires_grad_(), draw(T)).requires_grad


def test_cost_of_features_not_finite():
    student = draw(S)
    student[0, 0, 0, 0] = math.inf
    assert not cost(student, draw(T)).isfinite().all()


def build(groups=None, seed=0):
    """Return a matching with a random batch norm and teacher channels."""
    random = torch.Generator().manual_seed(seed)
    module = PooledMatching(S, T, groups)
    with torch.no_grad():
        module.matching.copy_(assign(torch.rand(S, T, generator=random), len(module.matching)))
        module.bn.weight.copy_(torch.randn(S, generator=random))
        module.bn.bias.copy_(torch.randn(S, generator=random))
    return module


def slow_loss(module, maps, teacher):
    """Return the loss by its definition: maps (B, S, H, W) in numpy, teacher a tensor."""
    g = np.array([[np.maximum(channel, 0).mean() for channel in image] for image in maps])
    h = by_image(teacher)
    total = 0.0
    weight, bias = array(module.bn.weight), array(module.bn.bias)
    normalised = weight * (g - g.mean(0)) / np.sqrt(g.var(0) + 1e-5) + bias
    for image in range(len(g)):
        groups = module.matching.tolist()
        target = np.array([np.mean([h[image][row[a]] for row in groups]) for a in range(S)])
        total += ((unit(normalised[image]) - unit(target)) ** 2).sum()
    return S * maps.shape[2] * maps.shape[3] * total


@pytest.mark.parametrize("groups", [None, 1])
def test_loss_equals_slow_loop(groups):
    module, student, teacher = build(groups), draw(S), draw(T, seed=1)
    assert module.matching.shape == (groups or T // S, S)
    loss = module(student, module.target(teacher))
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(module, array(student), teacher), rel=1e-4)


def test_gradients_are_slopes():
    module, teacher = build(), draw(T, seed=1).requires_grad_()
    student = draw(S).requires_grad_()
    target = module.target(teacher)
    assert not target.requires_grad
    module(student, target).backward()
    random, step = np.random.default_rng(2), 1e-6
    direction = random.standard_normal(student.shape)
    ends = [
        slow_loss(module, array(student) + sign * step * direction, teacher) for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert abs(slope) > 0.1
    assert (array(student.grad) * direction).sum() == pytest.approx(slope, rel=1e-3)
    for value in (module.bn.weight, module.bn.bias):
        slopes = []
        for a in range(S):
            ends = []
            for sign in (1, -1):
                moved = build().double()
                moved.bn.load_state_dict(module.bn.state_dict())
                getattr(moved.bn, "weight" if value is module.bn.weight else "bias").data[a] += (
                    sign * step
                )
                ends.append(slow_loss(moved, array(student), teacher))
            slopes.append((ends[0] - ends[1]) / (2 * step))
        assert value.grad.tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-3)


def test_loss_ignores_scale_of_teacher():
    module, student, teacher = build(), draw(S), draw(T, seed=1)
    losses = [module(student, module.target(scale * teacher)) for scale in (1.0, 1000.0)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_matching_can_be_set_in_place():
    module, student, teacher = build(1), draw(S), draw(T, seed=1)
    before = module(student, module.target(teacher))
    order = torch.tensor([6, 0, 5, 1, 4, 2, 3])
    module.matching.copy_(order.argsort()[module.matching])
    assert torch.equal(module(student, module.target(teacher[:, order])), before)
    assert not torch.equal(module(student, module.target(teacher)), before)


def test_state_and_random_numbers():
    """The module is saved, and draws no random numbers."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    module = PooledMatching(S, T)
    assert torch.equal(torch.rand(1), expected)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(module.state_dict()) == {"matching", *(f"bn.{name}" for name in norm)}


def test_pooled_refuses_narrow_teacher():
    with pytest.raises(
        ValueError, match="pooled features: a teacher of 2 channels has too few for a student of 3"
    ):
        PooledMatching(3, 2)
