"""Margins: the mean negative response of a batch norm, against the formula and integration."""

import math

import pytest
import torch
from scipy.integrate import quad

from mgd.margin import margin_from_bn


def slow_margin(weight, bias):
    """Return a channel's margin by the formula, in float64, with the distribution from erfc."""
    sigma = abs(weight)
    if sigma == 0:
        return min(bias, 0.0)
    z = bias / sigma
    below = 0.5 * math.erfc(z / math.sqrt(2))
    if below <= 0.001:
        return -3 * sigma
    return bias - sigma * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / below


def integrated_margin(weight, bias):
    """Return E[x | x < 0] of a normal distribution, by numeric integration of its density."""
    sigma = abs(weight)
    low, high = min(bias, 0.0) - 12 * sigma, min(0.0, bias + 12 * sigma)

    def density(x):
        return math.exp(-(((x - bias) / sigma) ** 2) / 2)

    kinks = [min(max(bias, low), high)]
    return (
        quad(lambda x: x * density(x), low, high, points=kinks)[0]
        / quad(density, low, high, points=kinks)[0]
    )


CHANNELS = [
    (1.0, 0.0),
    (0.3, -0.2),
    (-0.3, -0.2),
    (2.5, 1.7),
    (-1.2, 3.0),
    (0.01, -4.0),
    (0.5, -5.0),
    (1.0, 3.08),
    (-0.7, 0.6),
]


@pytest.mark.parametrize(("weight", "bias"), CHANNELS)
def test_margin_is_mean_of_negative_values(weight, bias):
    margin = margin_from_bn(torch.tensor([weight]), torch.tensor([bias]))
    assert margin.item() == pytest.approx(integrated_margin(weight, bias), rel=1e-5)


@pytest.mark.parametrize("T", [1, 7, 64, 2048])
def test_margin_equals_formula(T):
    random = torch.Generator().manual_seed(T)
    weight, bias = torch.randn(T, generator=random), 2 * torch.randn(T, generator=random)
    weight[:: max(T // 5, 1)] = 0.0
    margin = margin_from_bn(weight, bias)
    expected = [slow_margin(w, b) for w, b in zip(weight.tolist(), bias.tolist(), strict=True)]
    torch.testing.assert_close(margin, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.2])
def test_margin_of_rarely_negative_channel(weight):
    sigma = abs(weight)
    # Phi(-3.0902) = 0.001, up to which the margin is -3 deviations.
    bias = torch.tensor([3.0895, 3.0910, 4.0, 40.0, 1e6], dtype=torch.float64) * sigma
    margin = margin_from_bn(torch.full_like(bias, weight), bias)
    assert margin[0].item() == pytest.approx(slow_margin(weight, bias[0].item()), rel=1e-9)
    assert margin[0].item() > -sigma
    torch.testing.assert_close(margin[1:], torch.full((4,), -3 * sigma, dtype=torch.float64))


def test_margin_of_new_batch_norm():
    norm = torch.nn.BatchNorm2d(5)
    torch.testing.assert_close(
        margin_from_bn(norm.weight, norm.bias), torch.full((5,), -math.sqrt(2 / math.pi))
    )


def test_margin_ignores_sign_of_weight():
    weight, bias = torch.linspace(0.05, 3, 50), torch.linspace(-4, 4, 50)
    assert torch.equal(margin_from_bn(weight, bias), margin_from_bn(-weight, bias))


def test_margin_of_constant_channel():
    margin = margin_from_bn(torch.zeros(4), torch.tensor([-1.5, 0.0, -0.0, 2.0]))
    torch.testing.assert_close(margin, torch.tensor([-1.5, 0.0, 0.0, 0.0]))


def test_margin_of_tiny_weight():
    weight = torch.tensor([1e-38, -1e-30, 1e-30])
    torch.testing.assert_close(
        margin_from_bn(weight, torch.tensor([-1.0, 1.0, 0.0])), torch.tensor([-1.0, 0.0, 0.0])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_margin_is_finite_and_not_positive(dtype):
    weight, bias = torch.meshgrid(
        torch.linspace(-2, 2, 21), torch.linspace(-50, 50, 101), indexing="ij"
    )
    margin = margin_from_bn(weight.flatten().to(dtype), bias.flatten().to(dtype))
    assert margin.dtype == dtype  # of the weight
    assert margin.isfinite().all()
    assert (margin <= 0).all()
