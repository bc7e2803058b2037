from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from mgd.assignment import assign


def random_cost(S, T, seed=0):
    return torch.rand(S, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def total(cost, matching):
    return sum(cost[a, b].item() for row in matching.tolist() for a, b in enumerate(row))


def brute_force(cost, G):
    """The least total over all ways to give G teacher channels to each student channel."""
    S, T = cost.shape
    rows = cost.repeat(G, 1).tolist()
    return min(
        sum(row[b] for row, b in zip(rows, chosen, strict=True))
        for chosen in permutations(range(T), G * S)
    )


def linear_program(cost, G):
    """The same optimum as a transport problem: its linear relaxation has an integral solution."""
    S, T = cost.shape
    takes_G, taken_once = np.kron(np.eye(S), np.ones(T)), np.kron(np.ones(S), np.eye(T))
    solution = linprog(
        cost.flatten().numpy(),
        A_ub=taken_once,
        b_ub=np.ones(T),
        A_eq=takes_G,
        b_eq=np.full(S, G),
        bounds=(0, 1),
    )
    return solution.fun


SMALL = [
    (1, 1),
    (1, 5),
    (2, 2),
    (2, 4),
    (2, 5),
    (2, 7),
    (3, 3),
    (3, 5),
    (3, 7),
    (4, 5),
    (3, 8),
    (4, 7),
]
MEDIUM = [(8, 32), (16, 16), (16, 70), (7, 50), (1, 40), (24, 47), (24, 48)]


@pytest.mark.parametrize(("S", "T"), SMALL)
@pytest.mark.parametrize("seed", range(3))
def test_total_is_the_least_of_all_assignments(S, T, seed):
    cost = random_cost(S, T, seed)
    matching = assign(cost)
    assert matching.shape == (T // S, S)
    assert matching.dtype == torch.int64
    assert total(cost, matching) == pytest.approx(brute_force(cost, T // S), abs=1e-12)


@pytest.mark.parametrize(("S", "T"), MEDIUM)
def test_total_is_the_optimum_of_the_transport_problem(S, T):
    cost = random_cost(S, T, seed=T)
    assert total(cost, assign(cost)) == pytest.approx(linear_program(cost, T // S), abs=1e-6)


@pytest.mark.parametrize(("S", "T"), SMALL + MEDIUM)
def test_no_teacher_channel_is_taken_twice(S, T):
    taken = assign(random_cost(S, T, seed=1)).flatten().tolist()
    assert len(set(taken)) == len(taken) == T // S * S
    assert set(taken) <= set(range(T))


@pytest.mark.parametrize(("S", "T"), MEDIUM)
def test_columns_ascend(S, T):
    matching = assign(random_cost(S, T, seed=2))
    assert (matching.diff(dim=0) > 0).all()


def test_a_planted_matching_is_found():
    planted = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(5, 12)
    cost = 1 + random_cost(12, 60)
    for row in planted:
        cost[torch.arange(12), row] = 0.0
    assert torch.equal(assign(cost), planted.sort(dim=0).values)


def test_all_channels_compete_where_the_student_does_not_divide_the_teacher():
    cost = torch.ones(2, 5)
    cost[:, 4] = 0.0  # the last channel, which a square problem of 4 would not see
    assert 4 in assign(cost)


def test_reordered_channels_give_the_reordered_matching():
    cost, random = random_cost(6, 20), torch.Generator().manual_seed(3)
    s, t = torch.randperm(6, generator=random), torch.randperm(20, generator=random)
    assert torch.equal(t[assign(cost[s][:, t])].sort(dim=0).values, assign(cost)[:, s])


@pytest.mark.parametrize(("S", "T"), [(2, 6), (3, 7), (3, 8)])
@pytest.mark.parametrize("groups", [1, 2])
def test_fewer_groups_take_the_cheapest_channels(S, T, groups):
    cost = random_cost(S, T)
    matching = assign(cost, groups)
    assert matching.shape == (groups, S)
    assert total(cost, matching) == pytest.approx(brute_force(cost, groups), abs=1e-12)


def test_negative_costs_are_allowed():
    cost = random_cost(3, 6) - 5
    assert total(cost, assign(cost)) == pytest.approx(brute_force(cost, 2), abs=1e-12)


def test_the_cost_matrix_is_left_as_it_was():
    cost = random_cost(4, 9)
    before = cost.clone()
    assign(cost)
    assert torch.equal(cost, before)


@pytest.mark.parametrize(("S", "T", "groups"), [(4, 3, None), (2, 5, 3), (2, 5, 0), (2, 5, -1)])
def test_a_number_of_groups_that_cannot_be_is_refused(S, T, groups):
    with pytest.raises(ValueError, match="teacher channels cannot give"):
        assign(random_cost(S, T), groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_cost_that_is_not_finite_is_refused(value):
    cost = random_cost(2, 4)
    cost[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        assign(cost)
