"""A classifier's gradients in fixed point: the same bytes for any number of workers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.engine.fixed_point import FIXED_POINT, GROUP, LARGEST, FixedPointGradients
from job.cluster.objects import allgather

GROUPS, CLASSES, WIDTH = 4, 10, 64  # GROUPS: groups a worker


def batch():
    """Return a classifier, and features (n, WIDTH) and labels (n,) of the total batch.

    The features have several orders of magnitude.
    """
    torch.manual_seed(0)
    n = comm.size() * GROUPS * GROUP
    fc, labels = nn.Linear(WIDTH, CLASSES), torch.randint(CLASSES, (n,))
    return fc, torch.rand(n, WIDTH) * 10.0 ** torch.randint(-3, 4, (n, 1)), labels


def total_loss(fc, features, labels, n):
    return F.cross_entropy(fc(features), labels, reduction="sum") / n


def gradients_of(fc, losses):
    """Return the gradients after a step of groups with these losses."""
    gradients = FixedPointGradients(fc.named_parameters(prefix="fc"))
    gradients.clear()
    for loss in losses:
        gradients.add(loss)
    gradients.wait()
    return gradients


def test_sum_equals_one_worker_s():
    """The bytes are equal. They equal autograd's up to rounding."""
    fc, features, labels = batch()
    n = len(labels)
    groups = list(zip(features.split(GROUP), labels.split(GROUP), strict=True))
    gradients_of(
        fc, (total_loss(fc, *group, n) for group in groups[comm.rank() * GROUPS :][:GROUPS])
    )
    gradients = [value.grad for value in fc.parameters()]

    by_group = [
        torch.autograd.grad(total_loss(fc, *group, n), list(fc.parameters()))
        for group in reversed(groups)
    ]
    integers = [
        sum((term * FIXED_POINT).round().long() for term in terms)
        for terms in zip(*by_group, strict=True)
    ]
    expected = [integer.float() / FIXED_POINT for integer in integers]
    doubled = nn.Linear(WIDTH, CLASSES).double()
    doubled.load_state_dict(fc.state_dict())
    exact = torch.autograd.grad(
        total_loss(doubled, features.double(), labels, n), list(doubled.parameters())
    )
    errors = [
        (one - other).abs().max() / other.abs().max()
        for one, other in zip(gradients, exact, strict=True)
    ]
    same = all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    for worker_same, worst in allgather((same, max(errors).item()), "sums"):
        assert worker_same and worst < 1e-6


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2 * LARGEST / FIXED_POINT], ids=str
)
def test_bad_gradient_of_one_worker_is_found_on_all(value):
    fc = nn.Linear(2, 3)
    scale = torch.tensor(value if comm.rank() == comm.size() - 1 else 1.0)
    # The second group has finite gradients.
    losses = [(fc.bias * scale).sum() + fc.weight.sum(), fc.bias.sum() + fc.weight.sum()]
    gradients = gradients_of(fc, losses)
    finite = fc.weight.grad.isfinite().all().item()
    outcome = (math.isfinite(gradients.norm()), gradients.not_finite(), finite)
    assert allgather(outcome, "outcome") == [(False, ["fc.bias"], True)] * comm.size()


def test_clear_removes_the_last_step():
    fc = nn.Linear(2, 3)
    gradients = gradients_of(fc, [fc.bias.sum() * math.nan + fc.weight.sum()])
    gradients.clear()
    gradients.add((fc.bias * 2).sum() + (fc.weight * 3).sum())
    gradients.wait()
    outcome = (gradients.not_finite(), fc.bias.grad.tolist(), fc.weight.grad.tolist())
    N = comm.size()
    assert allgather(outcome, "next") == [([], [2.0 * N] * 3, [[3.0 * N] * 2] * 3)] * N
