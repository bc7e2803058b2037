"""Reducers of matched teacher channels, against slow loops, and the choices of random drop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mgd.reducers import REDUCERS


def case(B, S, T, H, W, G=None, seed=0):
    """Return teacher maps, margins and a matching with unsorted columns."""
    random = torch.Generator().manual_seed(seed)
    G = G or T // S
    matching = torch.randperm(T, generator=random)[: G * S].view(G, S)
    return torch.randn(B, T, H, W, generator=random), -torch.rand(T, generator=random), matching


def test_amp_keeps_sign():
    teacher = torch.tensor([1.0, -3.0, 2.0, -0.5]).view(1, 4, 1, 1)
    reduced, _ = REDUCERS["amp"](teacher, torch.zeros(4), torch.tensor([[0, 3], [1, 2]]))
    assert reduced.flatten().tolist() == [-3.0, 2.0]


def test_sm_refuses_several_groups():
    with pytest.raises(ValueError, match="for each student channel; expected 1"):
        REDUCERS["sm"](*case(1, 2, 4, 2, 2))


def chosen_channels(matching, T, B=3, H=24, W=24):
    """Return the channels that random drop chooses: each teacher map has its channel's index."""
    teacher = torch.arange(T, dtype=torch.float32).view(1, T, 1, 1).expand(B, T, H, W)
    return REDUCERS["rd"](teacher, torch.zeros(T), matching, torch.Generator().manual_seed(2))[0]


@pytest.mark.parametrize("G", [2, 3, 4])
def test_rd_chooses_channels_equally_often(G):
    """The fractions are of the positions of each map."""
    _, _, matching = case(1, 3, 3 * G + 1, 1, 1, G)
    for image in chosen_channels(matching, 3 * G + 1):
        for a, channels in enumerate(image):
            fractions = torch.stack([(channels == c).float().mean() for c in matching[:, a]])
            torch.testing.assert_close(fractions, torch.full((G,), 1 / G), rtol=0, atol=0.08)


def test_rd_chooses_for_each_position():
    """Choices of images, channels, rows and columns are independent."""
    matching = torch.arange(8).view(2, 4)  # group 0 has channels below 4
    groups = (chosen_channels(matching, 8) >= 4).float()
    for dim in range(4):
        first, second = groups.select(dim, 0), groups.select(dim, 1)
        assert 0.2 < (first != second).float().mean() < 0.8


def test_rd_chooses_each_margin():
    """Choices of channels are independent."""
    teacher, margin, matching = case(1, 3, 9, 1, 1)
    random = torch.Generator().manual_seed(3)
    drawn = torch.stack([REDUCERS["rd"](teacher, margin, matching, random)[1] for _ in range(60)])
    for a, column in enumerate(matching.T):
        assert set(drawn[:, a].tolist()) == set(margin[column].tolist())
    groups = torch.stack([(margin[matching] == d).int().argmax(0) for d in drawn])
    assert (groups != groups[:, :1]).any()


def test_rd_depends_on_seed():
    one, other = (
        REDUCERS["rd"](*case(2, 3, 12, 8, 8), torch.Generator().manual_seed(seed))
        for seed in (5, 6)
    )
    assert not torch.equal(one[0], other[0])


def test_rd_does_not_use_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    REDUCERS["rd"](*case(1, 2, 4, 3, 3), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


# Their sums are exact, and many are equal or opposite.
EIGHTHS = st.integers(-40, 40).map(lambda n: n / 8)


@st.composite
def cases(draw, groups=4):
    """Teacher maps (B, T, H, W), margins (T,) and a matching (G, S) of at most `groups` groups."""
    B, H, W, S, G = (draw(st.integers(1, largest)) for largest in (2, 3, 3, 4, groups))
    T = G * S + draw(st.integers(0, 2))
    teacher = torch.from_numpy(draw(arrays.arrays("float32", (B, T, H, W), elements=EIGHTHS)))
    margin = torch.from_numpy(draw(arrays.arrays("float32", T, elements=EIGHTHS)))
    return teacher, margin, torch.tensor(draw(st.permutations(range(T))))[: G * S].view(G, S)


def slow_reduce(teacher, margin, matching, pick, pick_margin):
    """Apply `pick` to the matched values of each position, `pick_margin` to matched margins."""
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
def test_pooling_equals_slow_loop(name, pick, pick_margin, case):
    maps, margin = REDUCERS[name](*case)
    expected_maps, expected_margin = slow_reduce(*case, pick, pick_margin)
    assert torch.equal(maps, expected_maps)
    # A third of a sum is rounded.
    assert torch.allclose(margin, expected_margin, rtol=1e-6, atol=1e-6)


@given(cases(groups=1))
def test_reducers_of_one_group_select_channels(case):
    teacher, margin, matching = case
    for reduce in REDUCERS.values():
        maps, margins = reduce(*case)
        assert torch.equal(maps, teacher[:, matching[0]])
        assert torch.equal(margins, margin[matching[0]])


@given(cases(), st.integers(0, 2**63 - 1))
def test_rd_chooses_matched_values_by_generator(case, seed):
    teacher, margin, matching = case
    maps, margins = REDUCERS["rd"](*case, torch.Generator().manual_seed(seed))
    repeated = REDUCERS["rd"](*case, torch.Generator().manual_seed(seed))
    assert torch.equal(maps, repeated[0]) and torch.equal(margins, repeated[1])
    assert (maps[:, None] == teacher[:, matching]).any(1).all()
    assert (margins == margin[matching]).any(0).all()


@pytest.mark.parametrize("name", ["amp", "sp"])
@given(case=cases(), random=st.randoms(use_true_random=False))
def test_pooling_ignores_order_of_groups_and_images(name, case, random):
    teacher, margin, matching = case
    maps, margins = REDUCERS[name](*case)
    rows, images = (torch.tensor(random.sample(range(n), n)) for n in (len(matching), len(teacher)))
    other_maps, other_margins = REDUCERS[name](teacher[images], margin, matching[rows])
    assert torch.equal(other_maps, maps[images])
    assert torch.allclose(other_margins, margins, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(REDUCERS))
@given(data=st.data())
def test_reducers_ignore_memory_format(name, data):
    """They do not change their inputs either."""
    inputs = data.draw(cases(groups=1 if name == "sm" else 4))
    before = [each.clone() for each in inputs]
    first = REDUCERS[name](*inputs, torch.Generator().manual_seed(0))
    teacher = inputs[0].contiguous(memory_format=torch.channels_last)
    second = REDUCERS[name](teacher, *inputs[1:], torch.Generator().manual_seed(0))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, (*inputs, teacher), (*before, before[0])))
