"""Counter-based random numbers."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.data.randomness import PURPOSES, counter, permutation, torch_seed

# Runs resume on other machines and newer libraries, so these draws must never change.
FROZEN_PERMUTATIONS = [
    (dict(n=10, seed=0, purpose="order"), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]),
    (dict(n=10, seed=7, purpose="shuffle", epoch=3, step=5), [9, 8, 1, 4, 7, 5, 3, 0, 2, 6]),
]
FROZEN_SEEDS = [
    (dict(seed=0, purpose="view"), 7511823885658883584),
    (dict(seed=2**63 - 1, purpose="weights"), 7323759689109562838),
    (dict(seed=1, purpose="drop", epoch=2, step=3, sample=4), 6415615003326368790),
]
FROZEN_WORDS = [
    17661128284321521039,
    8933424099995714536,
    16039515784814377425,
    18369505761893443068,
]

# Arguments of draws, which differ in each number.
DRAWS = [dict(seed=seed, purpose=purpose) for seed in (0, 1, 2**63 - 1) for purpose in PURPOSES]
DRAWS += [
    dict(seed=0, purpose="order", **{name: value})
    for name in ("epoch", "step", "sample")
    for value in (1, 2, 10**9)
]
DRAWS += [
    dict(seed=0, purpose="order", epoch=1, step=2, sample=3),
    dict(seed=0, purpose="order", epoch=3, step=2, sample=1),
]


@pytest.mark.parametrize(("arguments", "expected"), FROZEN_PERMUTATIONS)
def test_permutation_is_frozen(arguments, expected):
    assert permutation(**arguments).tolist() == expected


@pytest.mark.parametrize(("arguments", "expected"), FROZEN_SEEDS)
def test_torch_seed_is_frozen(arguments, expected):
    assert torch_seed(**arguments) == expected


def test_counter_is_frozen():
    assert counter(5, "refresh", epoch=1, step=2, sample=3).random_raw(4).tolist() == FROZEN_WORDS


def test_purposes_keep_their_order():
    """The key includes a purpose's index, so a new purpose must be the last."""
    assert PURPOSES[:8] == (
        "order",
        "shuffle",
        "view",
        "refresh",
        "drop",
        "weights",
        "pack",
        "matching",
    )


def test_permutation_has_no_bias():
    drawn = np.stack([permutation(8, 0, "shuffle", step=step) for step in range(2000)])
    counts = np.stack([(drawn == image).sum(0) for image in range(8)])  # (image, position)
    assert counts.min() > 250 * 0.7
    assert counts.max() < 250 * 1.3


def test_counter_depends_on_all_arguments():
    draws = [(permutation(50, **numbers).tolist(), torch_seed(**numbers)) for numbers in DRAWS]
    for (order, seed), (other_order, other_seed) in combinations(draws, 2):
        assert order != other_order
        assert seed != other_seed


def test_counter_long_draws_do_not_overlap():
    """A long draw counts up in the counter's first number, apart from samples and steps."""
    draws = [
        set(counter(0, "order", sample=s, step=t).random_raw(4096).tolist())
        for s in (0, 1)
        for t in (0, 1)
    ]
    assert len(set.union(*draws)) == 4 * 4096


def test_counter_refuses_an_unknown_purpose():
    with pytest.raises(ValueError, match="not in tuple"):
        counter(0, "coffee")


NUMBERS = st.integers(0, 2**63 - 1) | st.integers(0, 3)
ARGUMENTS = st.fixed_dictionaries(
    dict(seed=NUMBERS, purpose=st.sampled_from(PURPOSES)),
    optional=dict(epoch=NUMBERS, step=NUMBERS, sample=NUMBERS),
)


@given(arguments=ARGUMENTS, others=st.lists(ARGUMENTS, max_size=3), n=st.integers(0, 50))
def test_counter_depends_only_on_its_arguments(arguments, others, n):
    """Earlier draws and the generators of numpy and torch do not matter."""
    first = counter(**arguments).random_raw(8), permutation(n, **arguments), torch_seed(**arguments)
    for other in others:
        counter(**other).random_raw(5)
        permutation(3, **other)
        np.random.seed(torch_seed(**other) % 2**32)
        torch.manual_seed(torch_seed(**other))
    second = (
        counter(**arguments).random_raw(8),
        permutation(n, **arguments),
        torch_seed(**arguments),
    )
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@given(ARGUMENTS, ARGUMENTS)
def test_counter_differs_elsewhere(one, other):
    same = {"epoch": 0, "step": 0, "sample": 0, **one} == {
        "epoch": 0,
        "step": 0,
        "sample": 0,
        **other,
    }
    assert np.array_equal(counter(**one).random_raw(4), counter(**other).random_raw(4)) == same


@given(arguments=ARGUMENTS, name=st.sampled_from(["epoch", "step", "sample"]))
def test_counter_neighbours_never_overlap(arguments, name):
    """A long draw counts up in its own number, apart from its neighbours' draws."""
    here = arguments.get(name, 0)
    neighbour = arguments | {name: here - 1 if here else 1}
    assert not set(counter(**arguments).random_raw(400).tolist()) & set(
        counter(**neighbour).random_raw(400).tolist()
    )


@given(arguments=ARGUMENTS, n=st.integers(0, 1000))
def test_permutation_has_each_index_once(arguments, n):
    order = permutation(n, **arguments)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


@given(ARGUMENTS)
def test_torch_seed_fits_torch(arguments):
    assert type(torch_seed(**arguments)) is int and 0 <= torch_seed(**arguments) < 2**63
    assert torch.Generator().manual_seed(torch_seed(**arguments)).initial_seed() == torch_seed(
        **arguments
    )
