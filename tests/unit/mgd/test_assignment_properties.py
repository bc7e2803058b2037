from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mgd.assignment import assign


def total(cost, matching):
    return sum(cost[a, b].item() for row in matching.tolist() for a, b in enumerate(row))


@st.composite
def costs(draw, places=24):
    """Costs (S, T) of at most so many whole numbers, few different ones: sums are exact, and many solutions are equally good."""
    S = draw(st.integers(1, 4))
    T = draw(st.integers(S, max(S, places // S)))
    rows = draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=T, max_size=T), min_size=S, max_size=S)
    )
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def decided_costs(draw):
    """Costs with one best solution: to each entry is added a power of two of its own, and the sums of those all differ."""
    cost = draw(costs())
    return cost * 2**24 + 2.0 ** torch.arange(cost.numel(), dtype=torch.float64).view_as(cost)


@given(costs(), st.data())
def test_a_matching_takes_so_many_different_channels_in_ascending_columns(cost, data):
    S, T = cost.shape
    groups = data.draw(st.none() | st.integers(1, T // S))
    matching = assign(cost, groups)
    G = groups or T // S
    assert matching.shape == (G, S) and matching.dtype == torch.int64
    taken = matching.flatten().tolist()
    assert len(set(taken)) == G * S and set(taken) <= set(range(T))
    assert (matching.diff(dim=0) > 0).all()


@given(costs(places=7), st.data())
def test_no_assignment_costs_less(cost, data):
    S, T = cost.shape
    G = data.draw(st.integers(1, T // S))
    rows = cost.repeat(G, 1).tolist()
    least = min(
        sum(row[b] for row, b in zip(rows, chosen, strict=True))
        for chosen in permutations(range(T), G * S)
    )
    assert total(cost, assign(cost, G)) == least


@given(decided_costs(), st.randoms(use_true_random=False))
def test_channels_in_another_order_are_matched_as_before(cost, random):
    s, t = (torch.tensor(random.sample(range(n), n)) for n in cost.shape)
    assert torch.equal(t[assign(cost[s][:, t])].sort(dim=0).values, assign(cost)[:, s])


@given(decided_costs(), st.data())
def test_what_all_channels_cost_a_student_channel_does_not_count(cost, data):
    added = data.draw(st.lists(st.integers(-1000, 1000), min_size=len(cost), max_size=len(cost)))
    assert torch.equal(assign(cost + 2.0**24 * torch.tensor(added)[:, None]), assign(cost))


@given(decided_costs(), st.data())
def test_what_a_teacher_channel_costs_all_does_not_count_where_all_are_taken(cost, data):
    cost = cost[:, : cost.shape[1] // len(cost) * len(cost)]
    added = data.draw(
        st.lists(st.integers(-1000, 1000), min_size=cost.shape[1], max_size=cost.shape[1])
    )
    assert torch.equal(assign(cost + 2.0**24 * torch.tensor(added)), assign(cost))


@given(costs(), st.integers(-20, 20))
def test_the_unit_of_costs_does_not_count(cost, power):
    assert torch.equal(assign(cost * 2.0**power), assign(cost))


@given(costs())
def test_equal_costs_give_equal_matchings_however_they_lie_in_memory(cost):
    """Ties too: workers and resumed runs must come to the same matrix."""
    assert torch.equal(assign(cost.T.contiguous().T), assign(cost))
    assert torch.equal(assign(cost.float()), assign(cost))


@given(costs(places=12))
def test_a_channel_that_costs_more_than_any_other_is_left_free_if_one_can_be(cost):
    S, T = cost.shape
    dear = torch.cat([cost, cost.new_full((S, 1), 100.0)], dim=1)
    if (T + 1) // S == T // S:
        assert T not in assign(dear)
        assert total(dear, assign(dear)) == total(cost, assign(cost))
