from itertools import combinations

import numpy as np
import pytest
import torch

from job.data.randomness import PURPOSES, counter, permutation, torch_seed

# Runs are resumed on other machines and newer libraries: these draws must never change.
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

# One place for each number that a draw depends on.
PLACES = [dict(seed=seed, purpose=purpose) for seed in (0, 1, 2**63 - 1) for purpose in PURPOSES]
PLACES += [
    dict(seed=0, purpose="order", **{name: value})
    for name in ("epoch", "step", "sample")
    for value in (1, 2, 10**9)
]
PLACES += [
    dict(seed=0, purpose="order", epoch=1, step=2, sample=3),
    dict(seed=0, purpose="order", epoch=3, step=2, sample=1),
]


@pytest.mark.parametrize(("what", "expected"), FROZEN_PERMUTATIONS)
def test_permutations_are_frozen(what, expected):
    assert permutation(**what).tolist() == expected


@pytest.mark.parametrize(("what", "expected"), FROZEN_SEEDS)
def test_seeds_are_frozen(what, expected):
    assert torch_seed(**what) == expected


def test_counters_are_frozen():
    assert counter(5, "refresh", epoch=1, step=2, sample=3).random_raw(4).tolist() == FROZEN_WORDS


def test_purposes_keep_their_places():
    """A purpose's number goes into the key: a new one comes last."""
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


@pytest.mark.parametrize("n", [0, 1, 2, 37, 1000])
def test_a_permutation_is_one(n):
    found = permutation(n, 3, "order", epoch=2)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(n))


def test_a_permutation_is_the_same_however_often_it_is_drawn():
    first = permutation(100, 3, "shuffle", epoch=2, step=1)
    permutation(100, 4, "shuffle")
    np.random.seed(9)
    assert permutation(100, 3, "shuffle", epoch=2, step=1).tolist() == first.tolist()


def test_a_shuffle_keeps_no_image_in_its_place_more_often_than_chance():
    drawn = np.stack([permutation(8, 0, "shuffle", step=step) for step in range(2000)])
    counts = np.stack([(drawn == image).sum(0) for image in range(8)])  # (image, place)
    assert counts.min() > 250 * 0.7
    assert counts.max() < 250 * 1.3


def test_all_that_a_draw_is_for_changes_it():
    draws = [(permutation(50, **place).tolist(), torch_seed(**place)) for place in PLACES]
    for (order, seed), (other_order, other_seed) in combinations(draws, 2):
        assert order != other_order
        assert seed != other_seed


def test_draws_of_neighbouring_counters_do_not_overlap():
    """A long draw counts up in the counter's first word; that must not run into the next sample's or step's."""
    words = [
        set(counter(0, "order", sample=s, step=t).random_raw(4096).tolist())
        for s in (0, 1)
        for t in (0, 1)
    ]
    assert len(set.union(*words)) == 4 * 4096


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_torch_takes_every_seed(seed):
    for sample in range(50):
        found = torch_seed(seed, "view", epoch=10**6, step=10**7, sample=sample)
        assert type(found) is int
        assert 0 <= found < 2**63
        torch.Generator().manual_seed(found)


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match="not in tuple"):
        counter(0, "coffee")
