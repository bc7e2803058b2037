import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mgd.reducers import REDUCERS

EIGHTHS = st.integers(-40, 40).map(
    lambda n: n / 8
)  # of these sums are exact, and many are equal or opposite


@st.composite
def cases(draw, most=4):
    """A teacher's maps (B, T, H, W), margins (T,) and a matching (G, S) of at most so many groups."""
    B, H, W, S, G = (draw(st.integers(1, largest)) for largest in (2, 3, 3, 4, most))
    T = G * S + draw(st.integers(0, 2))
    teacher = torch.from_numpy(draw(arrays.arrays("float32", (B, T, H, W), elements=EIGHTHS)))
    margin = torch.from_numpy(draw(arrays.arrays("float32", T, elements=EIGHTHS)))
    return teacher, margin, torch.tensor(draw(st.permutations(range(T))))[: G * S].view(G, S)


def slowly(teacher, margin, matching, pick, pick_margin):
    """What `pick` makes of the values matched at each position, and `pick_margin` of the margins; element by element."""
    B, _, H, W = teacher.shape
    maps = torch.empty(B, matching.shape[1], H, W)
    for b, a, y, x in torch.cartesian_prod(*map(torch.arange, maps.shape)).view(-1, 4).tolist():
        maps[b, a, y, x] = pick([teacher[b, c, y, x].item() for c in matching[:, a].tolist()])
    return maps, torch.tensor(
        [pick_margin([margin[c].item() for c in column]) for column in matching.T.tolist()]
    )


def largest_magnitude(values):
    return max(values, key=lambda value: (abs(value), value))  # +a of +a and -a


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "pick", "pick_margin"), [("amp", largest_magnitude, mean), ("sp", max, max)]
)
@given(case=cases())
def test_pooling_is_that_of_a_slow_loop(name, pick, pick_margin, case):
    maps, margin = REDUCERS[name](*case)
    expected_maps, expected_margin = slowly(*case, pick, pick_margin)
    assert torch.equal(maps, expected_maps)
    assert torch.allclose(
        margin, expected_margin, rtol=1e-6, atol=1e-6
    )  # a third of a sum is rounded


@given(cases(most=1))
def test_sparse_matching_is_a_selection_and_what_pooling_makes_of_one_channel(case):
    teacher, margin, matching = case
    for name in REDUCERS:
        maps, margins = REDUCERS[name](*case)
        assert torch.equal(maps, teacher[:, matching[0]])
        assert torch.equal(margins, margin[matching[0]])


@given(cases())
def test_absolute_max_pooling_dominates_every_matched_response(case):
    teacher, _, matching = case
    maps, _ = REDUCERS["amp"](*case)
    for row in matching:
        assert (maps.abs() >= teacher[:, row].abs()).all()


@given(cases(), st.integers(0, 2**63 - 1))
def test_random_drop_takes_members_alone_and_is_a_function_of_its_generator(case, seed):
    teacher, margin, matching = case
    maps, margins = REDUCERS["rd"](*case, torch.Generator().manual_seed(seed))
    again, margins_again = REDUCERS["rd"](*case, torch.Generator().manual_seed(seed))
    assert torch.equal(maps, again) and torch.equal(margins, margins_again)
    assert (maps[:, None] == teacher[:, matching]).any(1).all()
    assert (margins == margin[matching]).any(0).all()


@pytest.mark.parametrize("name", ["amp", "sp"])
@given(case=cases(), random=st.randoms(use_true_random=False))
def test_pooling_does_not_see_the_order_within_a_match_or_of_images(name, case, random):
    teacher, margin, matching = case
    maps, margins = REDUCERS[name](*case)
    rows, images = (torch.tensor(random.sample(range(n), n)) for n in (len(matching), len(teacher)))
    other_maps, other_margins = REDUCERS[name](teacher[images], margin, matching[rows])
    assert torch.equal(other_maps, maps[images])
    assert torch.allclose(other_margins, margins, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(REDUCERS))
@given(data=st.data())
def test_the_way_in_memory_does_not_count_and_the_teacher_stays_as_it_is(name, data):
    teacher, margin, matching = data.draw(cases(most=1 if name == "sm" else 4))
    before = teacher.clone()
    first = REDUCERS[name](teacher, margin, matching, torch.Generator().manual_seed(0))
    other_way = teacher.contiguous(memory_format=torch.channels_last)
    second = REDUCERS[name](other_way, margin, matching, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(teacher, before) and torch.equal(other_way, before)
