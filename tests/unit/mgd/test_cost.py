"""The cost of matching: squared distances of normalised maps."""

import math

import pytest
import torch

from mgd.cost import channel_cost


def normalised(channel_map):
    values = channel_map.flatten().tolist()
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values] if norm > 0 else values


def slow_cost(student, teacher):
    """Return squared distances of normalised maps, image by image and channel by channel."""
    cost = torch.zeros(student.shape[1], teacher.shape[1], dtype=torch.float64)
    for s_image, t_image in zip(student, teacher, strict=True):
        s_maps, t_maps = [normalised(c) for c in s_image], [normalised(c) for c in t_image]
        for a, s in enumerate(s_maps):
            for b, t in enumerate(t_maps):
                cost[a, b] += sum((x - y) ** 2 for x, y in zip(s, t, strict=True))
    return cost


def features(B, S, T, H, W, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(B, S, H, W, generator=random), 3 * torch.randn(
        B, T, H, W, generator=random
    ) - 1


SHAPES = [
    (3, 4, 8, 5, 5),
    (2, 3, 7, 4, 6),
    (1, 2, 5, 3, 3),
    (4, 3, 6, 1, 1),
    (1, 1, 1, 1, 1),
    (5, 6, 6, 2, 7),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_equals_slow_loop(shape):
    student, teacher = features(*shape)
    cost = channel_cost(student, teacher)
    assert cost.shape == shape[1:3]
    assert cost.dtype == torch.float64
    torch.testing.assert_close(cost, slow_cost(student, teacher), rtol=1e-5, atol=1e-5)


def test_cost_of_zero_and_constant_channels():
    student, teacher = features(3, 4, 6, 4, 4)
    student[:, 0], student[:, 1], student[1, 2] = 0.0, 0.7, 0.0
    teacher[:, 0], teacher[:, 1], teacher[:, 2] = 0.0, 5.0, -5.0
    cost = channel_cost(student, teacher)
    torch.testing.assert_close(cost, slow_cost(student, teacher), rtol=1e-5, atol=1e-5)
    assert cost[0, 0] == 0  # two silent channels
    assert cost[0, 3].item() == pytest.approx(3, abs=1e-5)  # a distance of 1 in each of 3 images
    assert cost[1, 1].item() == pytest.approx(0, abs=1e-5)
    assert cost[1, 2].item() == pytest.approx(12, abs=1e-5)  # opposite maps: a distance of 4


def test_cost_of_scaled_channel_is_least():
    student, _ = features(4, 5, 5, 3, 3)
    order = torch.tensor([3, 0, 4, 1, 2])
    scale = torch.tensor([0.01, 2.0, 100.0, 1.0, 7.0]).view(1, -1, 1, 1)
    cost = channel_cost(student, scale * student[:, order])
    assert torch.equal(order[cost.argmin(1)], torch.arange(5))
    torch.testing.assert_close(
        cost.min(1).values, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_costs_of_batches_add_up():
    student, teacher = features(6, 4, 9, 5, 3)
    total = channel_cost(student[:1], teacher[:1]) + channel_cost(student[1:], teacher[1:])
    torch.testing.assert_close(total, channel_cost(student, teacher), rtol=1e-6, atol=1e-5)


def test_cost_weighs_images_equally():
    student, teacher = features(3, 4, 9, 5, 3)
    strength = torch.tensor([1.0, 50.0, 0.02]).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        channel_cost(strength * student, teacher),
        channel_cost(student, teacher),
        rtol=1e-5,
        atol=1e-5,
    )


def test_cost_of_bf16_is_summed_in_float32():
    student, teacher = (f.bfloat16() for f in features(4, 3, 6, 14, 14))
    torch.testing.assert_close(
        channel_cost(student, teacher), slow_cost(student, teacher), rtol=1e-5, atol=1e-5
    )


def test_cost_ignores_memory_format():
    student, teacher = features(3, 4, 8, 5, 6)
    last = channel_cost(
        student.to(memory_format=torch.channels_last), teacher.to(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(last, channel_cost(student, teacher), rtol=1e-6, atol=1e-5)


def test_cost_has_no_gradient():
    student, teacher = features(2, 3, 6, 4, 4)
    assert not channel_cost(student.requires_grad_(), teacher).requires_grad


@pytest.mark.parametrize("shape", [(3, 8, 4, 4), (2, 8, 4, 2), (2, 8, 2, 8)])
def test_cost_refuses_unequal_shapes(shape):
    with pytest.raises(ValueError, match="must agree"):
        channel_cost(torch.ones(2, 4, 4, 4), torch.ones(shape))
