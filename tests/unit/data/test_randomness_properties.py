import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.data.randomness import PURPOSES, counter, permutation, torch_seed

NUMBERS = st.integers(0, 2**63 - 1) | st.integers(0, 3)
PLACES = st.fixed_dictionaries(
    dict(seed=NUMBERS, purpose=st.sampled_from(PURPOSES)),
    optional=dict(epoch=NUMBERS, step=NUMBERS, sample=NUMBERS),
)


@given(place=PLACES, others=st.lists(PLACES, max_size=3), n=st.integers(0, 50))
def test_a_draw_depends_on_its_place_alone(place, others, n):
    """Not on what was drawn before, nor on the generators of numpy and torch."""
    first = counter(**place).random_raw(8), permutation(n, **place), torch_seed(**place)
    for other in others:
        counter(**other).random_raw(5)
        permutation(3, **other)
        np.random.seed(torch_seed(**other) % 2**32)
        torch.manual_seed(torch_seed(**other))
    second = counter(**place).random_raw(8), permutation(n, **place), torch_seed(**place)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@given(PLACES, PLACES)
def test_other_places_have_other_draws(one, other):
    same = {"epoch": 0, "step": 0, "sample": 0, **one} == {
        "epoch": 0,
        "step": 0,
        "sample": 0,
        **other,
    }
    assert np.array_equal(counter(**one).random_raw(4), counter(**other).random_raw(4)) == same


@given(place=PLACES, what=st.sampled_from(["epoch", "step", "sample"]))
def test_neighbouring_places_do_not_overlap(place, what):
    """A long draw counts up in a word of its own, which must not run into a neighbour's."""
    here = place.get(what, 0)
    neighbour = place | {what: here - 1 if here else 1}
    assert not set(counter(**place).random_raw(400).tolist()) & set(
        counter(**neighbour).random_raw(400).tolist()
    )


@given(place=PLACES, n=st.integers(0, 200))
def test_a_permutation_is_one(place, n):
    found = permutation(n, **place)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(n))


@given(PLACES)
def test_a_torch_seed_is_one_that_torch_takes(place):
    assert 0 <= torch_seed(**place) < 2**63
    assert torch.Generator().manual_seed(torch_seed(**place)).initial_seed() == torch_seed(**place)
