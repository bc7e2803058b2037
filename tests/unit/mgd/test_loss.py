"""The partial squared distance and its gradient, against its definition in slow loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mgd.loss import partial_l2


def slow_partial_l2(student, target, margin):
    """Return the loss by its definition, one element at a time, in float64."""
    loss = 0.0
    for s_image, t_image in zip(student, target, strict=True):
        for s_map, t_map, m in zip(s_image, t_image, margin.tolist(), strict=True):
            for s, t in zip(s_map.flatten().tolist(), t_map.flatten().tolist(), strict=True):
                t = max(t, m)
                if s > t or t > 0:
                    loss += (s - t) ** 2
    return loss


def case(B, S, H, W):
    random = torch.Generator().manual_seed(0)
    student, target = torch.randn(2, B, S, H, W, generator=random)
    return student, 1.5 * target, -torch.rand(S, generator=random)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (1, 4, 3, 3), (5, 2, 1, 1), (1, 1, 1, 1), (3, 6, 2, 7)]
)
def test_loss_equals_slow_loop(shape):
    loss = partial_l2(*case(*shape))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_partial_l2(*case(*shape)), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "target", "margin", "expected"),
    [
        (2.0, 1.0, -0.5, 1.0),
        (0.5, 1.0, -0.5, 0.25),
        (-2.0, 1.0, -0.5, 9.0),  # below a positive target
        (1.0, -3.0, -0.5, 2.25),  # above a silent teacher: only the distance to the margin counts
        (-0.2, -0.3, -0.5, 0.01),
        (-0.4, -0.3, -0.5, 0.0),  # below a silent teacher
        (-0.6, -3.0, -0.5, 0.0),
        (-1.0, 0.0, -0.5, 0.0),  # a target of zero is not positive
        (0.5, 0.0, -0.5, 0.25),
        (-0.3, -0.3, -0.5, 0.0),
    ],
)
def test_loss_of_one_element(student, target, margin, expected):
    element = [torch.full((1, 1, 1, 1), value) for value in (student, target)]
    assert partial_l2(*element, torch.tensor([margin])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("half", ["student", "target"])
def test_loss_of_bf16_is_summed_in_float32(half):
    student, target, margin = case(4, 8, 14, 14)
    if half == "student":
        student = student.bfloat16()
    else:
        target, margin = target.bfloat16(), margin.bfloat16()
    loss = partial_l2(student, target, margin)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_partial_l2(student, target, margin), rel=1e-5)


# Their squares and sums are exact in float32.
EIGHTHS = st.integers(-40, 40).map(lambda n: n / 8)


@st.composite
def cases(draw):
    """Student and target (B, S, H, W) and margins (S,), in eighths."""
    shape = tuple(draw(st.integers(1, 3)) for _ in range(4))
    maps = arrays.arrays("float32", shape, elements=EIGHTHS)
    margin = arrays.arrays("float32", shape[1], elements=EIGHTHS)
    return tuple(torch.from_numpy(draw(strategy)) for strategy in (maps, maps, margin))


def by_formula(student, target, margin):
    limited = torch.maximum(target, margin.view(1, -1, 1, 1))
    counts = (student > limited) | (limited > 0)
    return torch.where(counts, (student - limited) ** 2, 0.0).sum()


def gradient(loss, student, *others):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, *others), student)[0]


@given(cases())
def test_loss_and_gradient_equal_formula(case):
    """Autograd computes the formula's gradient."""
    assert partial_l2(*case) == by_formula(*case)
    expected = gradient(by_formula, *(each.double() for each in case)).float()
    assert torch.equal(gradient(partial_l2, *case), expected)


@given(cases(), st.data())
def test_gradient_equals_finite_differences(case, data):
    """They are equal, because central differences of a square are its derivative.

    A step from between two eighths crosses no eighth.
    """
    student, target, margin = (each.double() for each in case)
    student += 1 / 16
    element = tuple(data.draw(st.integers(0, n - 1)) for n in student.shape)
    up, down = student.clone(), student.clone()
    up[element] += 1 / 32
    down[element] -= 1 / 32
    difference = (partial_l2(up, target, margin) - partial_l2(down, target, margin)) * 16
    assert gradient(partial_l2, student, target, margin)[element] == difference


@given(cases(), st.integers(0, 40))
def test_loss_ignores_student_below_silent_target(case, depth):
    student, target, margin = case
    limited = torch.maximum(target, margin.view(1, -1, 1, 1))
    silent = (limited <= 0) & (student <= limited)
    lower = torch.where(silent, student - depth, student)
    assert partial_l2(lower, target, margin) == partial_l2(student, target, margin)
    assert not gradient(partial_l2, student, target, margin)[silent].any()
