"""The matching of least cost: against brute force, a linear program and properties."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from mgd.assignment import assign


def random_cost(S, T, seed=0):
    return torch.rand(S, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def total(cost, matching):
    return sum(cost[a, b].item() for row in matching.tolist() for a, b in enumerate(row))


def linear_program(cost, G):
    """Return the transport problem's optimum. Its linear relaxation has an integer solution."""
    S, T = cost.shape
    of_student, of_teacher = np.kron(np.eye(S), np.ones(T)), np.kron(np.ones(S), np.eye(T))
    solution = linprog(
        cost.flatten().numpy(),
        A_ub=of_teacher,
        b_ub=np.ones(T),
        A_eq=of_student,
        b_eq=np.full(S, G),
        bounds=(0, 1),
    )
    return solution.fun


SHAPES = [(8, 32), (16, 16), (16, 70), (7, 50), (1, 40), (24, 47), (24, 48)]


@pytest.mark.parametrize(("S", "T"), SHAPES)
def test_assign_solves_transport_problem(S, T):
    cost = random_cost(S, T, seed=T)
    assert total(cost, assign(cost)) == pytest.approx(linear_program(cost, T // S), abs=1e-6)


@pytest.mark.parametrize(("S", "T"), SHAPES)
def test_assign_uses_each_channel_once(S, T):
    matching = assign(random_cost(S, T, seed=1))
    channels = matching.flatten().tolist()
    assert len(set(channels)) == len(channels) == T // S * S
    assert set(channels) <= set(range(T))
    assert (matching.diff(dim=0) > 0).all()


def test_assign_finds_planted_matching():
    planted = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(5, 12)
    cost = 1 + random_cost(12, 60)
    for row in planted:
        cost[torch.arange(12), row] = 0.0
    assert torch.equal(assign(cost), planted.sort(dim=0).values)


def test_assign_does_not_change_cost():
    cost = random_cost(4, 9)
    before = cost.clone()
    assign(cost)
    assert torch.equal(cost, before)


@pytest.mark.parametrize(("S", "T", "groups"), [(4, 3, None), (2, 5, 3), (2, 5, 0), (2, 5, -1)])
def test_assign_refuses_groups(S, T, groups):
    with pytest.raises(ValueError, match="teacher channels cannot give"):
        assign(random_cost(S, T), groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_assign_refuses_cost_not_finite(value):
    cost = random_cost(2, 4)
    cost[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        assign(cost)


@st.composite
def costs(draw, entries=24):
    """Costs (S, T) of small integers. Their sums are exact, and many solutions are equally good."""
    S = draw(st.integers(1, 4))
    T = draw(st.integers(S, max(S, entries // S)))
    row = st.lists(st.integers(-3, 3), min_size=T, max_size=T)
    rows = draw(st.lists(row, min_size=S, max_size=S))
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def unique_costs(draw):
    """Costs with one best solution: each entry has its own power of two, so all sums differ."""
    cost = draw(costs())
    return cost * 2**24 + 2.0 ** torch.arange(cost.numel(), dtype=torch.float64).view_as(cost)


def added(data, number):
    """Return constants to add to rows or columns of unique costs, (number,)."""
    integers = st.lists(st.integers(-1000, 1000), min_size=number, max_size=number)
    return 2.0**24 * torch.tensor(data.draw(integers))


@given(costs(), st.data())
def test_assign_gives_ascending_columns_of_groups(cost, data):
    S, T = cost.shape
    groups = data.draw(st.none() | st.integers(1, T // S))
    matching = assign(cost, groups)
    G = groups or T // S
    assert matching.shape == (G, S) and matching.dtype == torch.int64
    channels = matching.flatten().tolist()
    assert len(set(channels)) == G * S and set(channels) <= set(range(T))
    assert (matching.diff(dim=0) > 0).all()


@given(costs(entries=7), st.data())
def test_assign_has_least_cost_of_all(cost, data):
    """All assignments are compared, even if the student does not divide the teacher."""
    S, T = cost.shape
    G = data.draw(st.integers(1, T // S))
    rows = cost.repeat(G, 1).tolist()
    least = min(
        sum(row[b] for row, b in zip(rows, chosen, strict=True))
        for chosen in permutations(range(T), G * S)
    )
    assert total(cost, assign(cost, G)) == least


@given(unique_costs(), st.randoms(use_true_random=False))
def test_assign_follows_order_of_channels(cost, random):
    s, t = (torch.tensor(random.sample(range(n), n)) for n in cost.shape)
    assert torch.equal(t[assign(cost[s][:, t])].sort(dim=0).values, assign(cost)[:, s])


@given(unique_costs(), st.data())
def test_assign_ignores_constant_of_student_channel(cost, data):
    assert torch.equal(assign(cost + added(data, len(cost))[:, None]), assign(cost))


@given(unique_costs(), st.data())
def test_assign_ignores_constant_of_teacher_channel(cost, data):
    """All teacher channels must be matched."""
    cost = cost[:, : cost.shape[1] // len(cost) * len(cost)]
    assert torch.equal(assign(cost + added(data, cost.shape[1])), assign(cost))


@given(costs(), st.integers(-20, 20))
def test_assign_ignores_unit_of_cost(cost, power):
    assert torch.equal(assign(cost * 2.0**power), assign(cost))


@given(costs())
def test_assign_ignores_memory_order_and_dtype(cost):
    """Workers and resumed runs must get the same matrix, even with ties."""
    assert torch.equal(assign(cost.T.contiguous().T), assign(cost))
    assert torch.equal(assign(cost.float()), assign(cost))


@given(costs(entries=12))
def test_assign_leaves_costly_channel_unmatched(cost):
    """The sizes must allow an unmatched channel."""
    S, T = cost.shape
    costly = torch.cat([cost, cost.new_full((S, 1), 100.0)], dim=1)
    if (T + 1) // S == T // S:
        assert T not in assign(costly)
        assert total(costly, assign(costly)) == total(cost, assign(cost))
