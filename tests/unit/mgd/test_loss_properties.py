import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mgd.loss import partial_l2

EIGHTHS = st.integers(-40, 40).map(
    lambda n: n / 8
)  # squares and sums of these are exact in single precision


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
def test_value_and_gradient_are_those_of_the_formula(case):
    """The formula's own gradient is autograd's."""
    assert partial_l2(*case) == by_formula(*case)
    assert torch.equal(
        gradient(partial_l2, *case), gradient(by_formula, *(part.double() for part in case)).float()
    )


@given(cases(), st.data())
def test_the_gradient_is_that_of_finite_differences(case, data):
    """Exactly: a square's central differences are its derivative, and a step from between two eighths crosses none."""
    student, target, margin = (part.double() for part in case)
    student += 1 / 16
    place = tuple(data.draw(st.integers(0, n - 1)) for n in student.shape)
    up, down = student.clone(), student.clone()
    up[place] += 1 / 32
    down[place] -= 1 / 32
    difference = (partial_l2(up, target, margin) - partial_l2(down, target, margin)) * 16
    assert gradient(partial_l2, student, target, margin)[place] == difference


@given(cases(), st.integers(0, 40))
def test_a_student_below_a_silent_target_may_be_as_low_as_it_likes(case, depth):
    student, target, margin = case
    limited = torch.maximum(target, margin.view(1, -1, 1, 1))
    silent = (limited <= 0) & (student <= limited)
    lower = torch.where(silent, student - depth, student)
    assert partial_l2(lower, target, margin) == partial_l2(student, target, margin)
    assert not gradient(partial_l2, student, target, margin)[silent].any()


@given(cases())
def test_the_limited_target_itself_costs_nothing_and_any_other_student_something_where_it_is_positive(
    case,
):
    student, target, margin = case
    limited = torch.maximum(target, margin.view(1, -1, 1, 1))
    assert partial_l2(limited, target, margin) == 0
    if ((student != limited) & ((limited > 0) | (student > limited))).any():
        assert partial_l2(student, target, margin) > 0


@given(cases(), st.integers(-3, 3))
def test_the_loss_grows_with_the_square_of_the_unit(case, power):
    unit = 2.0**power
    assert partial_l2(*(unit * part for part in case)) == unit**2 * partial_l2(*case)
    assert torch.equal(
        gradient(partial_l2, *(unit * part for part in case)), unit * gradient(partial_l2, *case)
    )


@given(cases())
def test_the_loss_of_a_batch_is_the_sum_of_its_images_and_channels(case):
    student, target, margin = case
    B, S = student.shape[:2]
    parts = [
        partial_l2(student[b : b + 1, a : a + 1], target[b : b + 1, a : a + 1], margin[a : a + 1])
        for b in range(B)
        for a in range(S)
    ]
    assert sum(parts) == partial_l2(*case)
