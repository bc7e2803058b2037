"""LARS, compared with plain Python."""

import math

import pytest
import torch

from job.engine.lars import LARS, norm


def slow_lars(values, gradients, rates, momentum, decay):
    """Return a parameter, a list of numbers, after a step with each gradient and rate."""
    velocity = [0.0] * len(values)
    for gradient, rate in zip(gradients, rates, strict=True):
        w, g = math.hypot(*values), math.hypot(*gradient)
        ratio = 0.001 * w / (g + decay * w + 1e-8) if w and g else 1.0
        pairs = zip(velocity, gradient, values, strict=True)
        velocity = [momentum * v + ratio * (each + decay * value) for v, each, value in pairs]
        values = [value - rate * v for value, v in zip(values, velocity, strict=True)]
    return values


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.0)])
def test_lars_steps_equal_plain_python(momentum, decay):
    """A weight, and a bias that starts at 0. In the fourth step all gradients are 0."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(3, 4, generator=generator), torch.zeros(3)]
    gradients = [list(torch.randn(7, *start.shape, generator=generator)) for start in starts]
    for each in gradients:
        each[3].zero_()
    gradients[0][5] *= 1e-6  # a ratio above 1
    rates = [1.6] * 4 + [0.8] * 3
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    lars = LARS(parameters, 0.0, momentum, decay)
    for step, rate in enumerate(rates):
        lars.param_groups[0]["lr"] = rate
        for parameter, each in zip(parameters, gradients, strict=True):
            parameter.grad = each[step].clone()
        lars.step()
    for parameter, start, each in zip(parameters, starts, gradients, strict=True):
        flat = [gradient.flatten().tolist() for gradient in each]
        expected = torch.tensor(slow_lars(start.flatten().tolist(), flat, rates, momentum, decay))
        torch.testing.assert_close(parameter.detach().flatten(), expected, rtol=1e-5, atol=1e-6)


def test_norm_does_not_depend_on_order():
    """Threads sum in different orders."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) ** 3
    orders = [torch.randperm(len(values), generator=generator) for _ in range(5)]
    norms = {norm(values[order]).item() for order in orders}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(math.hypot(*values.tolist()), rel=1e-7)
    assert norm(torch.zeros(3)) == 0
