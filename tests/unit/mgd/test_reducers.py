import pytest
import torch

from mgd.reducers import REDUCERS


def case(B, S, T, H, W, G=None, seed=0):
    """Teacher maps, margins and a matching with columns in no order, which a reducer must not rely on."""
    random = torch.Generator().manual_seed(seed)
    G = G or T // S
    matching = torch.randperm(T, generator=random)[: G * S].view(G, S)
    return torch.randn(B, T, H, W, generator=random), -torch.rand(T, generator=random), matching


def slow_reduce(teacher, margin, matching, pick, pick_margin):
    """Apply `pick` to the matched values of each position, `pick_margin` to the matched margins."""
    B, _, H, W = teacher.shape
    reduced = torch.empty(B, matching.shape[1], H, W)
    for b in range(B):
        for a, column in enumerate(matching.T.tolist()):
            for y in range(H):
                for x in range(W):
                    reduced[b, a, y, x] = pick([teacher[b, c, y, x].item() for c in column])
    return reduced, torch.tensor(
        [pick_margin([margin[c].item() for c in column]) for column in matching.T.tolist()]
    )


def largest_magnitude(values):
    return max(values, key=abs)


def mean(values):
    return sum(values) / len(values)


SHAPES = [(2, 3, 12, 4, 5), (3, 3, 7, 2, 2), (1, 2, 5, 3, 3), (4, 5, 5, 1, 1), (1, 1, 6, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "pick", "pick_margin"), [("amp", largest_magnitude, mean), ("sp", max, max)]
)
def test_pooling_takes_each_position_by_the_formula(shape, name, pick, pick_margin):
    teacher, margin, matching = case(*shape)
    reduced, reduced_margin = REDUCERS[name](teacher, margin, matching)
    expected, expected_margin = slow_reduce(teacher, margin, matching, pick, pick_margin)
    assert torch.equal(reduced, expected)
    torch.testing.assert_close(reduced_margin, expected_margin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["amp", "sp", "rd"])
def test_zero_and_constant_channels_pass(name):
    teacher, margin, matching = case(2, 2, 6, 3, 3)
    teacher[:, matching[:, 0]] = 0.0
    teacher[:, matching[:, 1]] = -0.5
    reduced, _ = REDUCERS[name](teacher, margin, matching)
    assert torch.equal(reduced[:, 0], torch.zeros(2, 3, 3))
    assert torch.equal(reduced[:, 1], torch.full((2, 3, 3), -0.5))


def test_absolute_max_keeps_the_sign():
    teacher = torch.tensor([1.0, -3.0, 2.0, -0.5]).view(1, 4, 1, 1)
    reduced, _ = REDUCERS["amp"](teacher, torch.zeros(4), torch.tensor([[0, 3], [1, 2]]))
    assert reduced.flatten().tolist() == [-3.0, 2.0]


@pytest.mark.parametrize("name", ["amp", "sp", "rd", "sm"])
def test_one_group_selects_the_matched_channels(name):
    teacher, margin, matching = case(2, 4, 9, 3, 2, G=1)
    reduced, reduced_margin = REDUCERS[name](teacher, margin, matching)
    for a, c in enumerate(matching[0].tolist()):
        assert torch.equal(reduced[:, a], teacher[:, c])
        assert reduced_margin[a] == margin[c]


def test_sparse_matching_refuses_more_than_one_group():
    with pytest.raises(ValueError, match="for each student channel; expected 1"):
        REDUCERS["sm"](*case(1, 2, 4, 2, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_drop_takes_only_matched_values_of_the_same_position(shape):
    teacher, margin, matching = case(*shape)
    reduced, reduced_margin = REDUCERS["rd"](
        teacher, margin, matching, torch.Generator().manual_seed(1)
    )
    assert reduced.shape == (shape[0], shape[1], shape[3], shape[4])
    for a, column in enumerate(matching.T):
        assert (teacher[:, column] == reduced[:, a : a + 1]).any(dim=1).all()
        assert reduced_margin[a] in margin[column]


def channels_dropped_to(matching, T, B=3, H=24, W=24):
    """Which teacher channel random drop took at each position: every channel's maps hold its own index."""
    teacher = torch.arange(T, dtype=torch.float32).view(1, T, 1, 1).expand(B, T, H, W)
    return REDUCERS["rd"](teacher, torch.zeros(T), matching, torch.Generator().manual_seed(2))[0]


@pytest.mark.parametrize("G", [2, 3, 4])
def test_random_drop_takes_every_matched_channel_equally_often_within_one_map(G):
    _, _, matching = case(1, 3, 3 * G + 1, 1, 1, G)
    taken = channels_dropped_to(matching, 3 * G + 1)
    for image in taken:
        for a, channels in enumerate(image):
            share = torch.stack([(channels == c).float().mean() for c in matching[:, a]])
            torch.testing.assert_close(share, torch.full((G,), 1 / G), rtol=0, atol=0.08)


def test_random_drop_draws_anew_for_each_image_channel_row_and_column():
    matching = torch.arange(8).view(2, 4)  # group 0 has channels below 4
    groups = (channels_dropped_to(matching, 8) >= 4).float()
    for dim in range(4):
        first, second = groups.select(dim, 0), groups.select(dim, 1)
        assert 0.2 < (first != second).float().mean() < 0.8


def test_random_drop_takes_every_matched_margin_and_draws_each_channels_own():
    teacher, margin, matching = case(1, 3, 9, 1, 1)
    random = torch.Generator().manual_seed(3)
    drawn = torch.stack([REDUCERS["rd"](teacher, margin, matching, random)[1] for _ in range(60)])
    for a, column in enumerate(matching.T):
        assert set(drawn[:, a].tolist()) == set(margin[column].tolist())
    groups = torch.stack([(margin[matching] == d).int().argmax(0) for d in drawn])
    assert (groups != groups[:, :1]).any()


def test_random_drop_is_a_function_of_its_generator():
    inputs = case(2, 3, 12, 8, 8)
    once, again, other = (
        REDUCERS["rd"](*inputs, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert not torch.equal(once[0], other[0])


def test_random_drop_with_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    REDUCERS["rd"](*case(1, 2, 4, 3, 3), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["amp", "sp", "rd"])
def test_the_teacher_is_left_as_it_was(name):
    teacher, margin, matching = case(2, 2, 6, 3, 3)
    before = teacher.clone(), margin.clone(), matching.clone()
    REDUCERS[name](teacher, margin, matching)
    assert all(torch.equal(a, b) for a, b in zip(before, (teacher, margin, matching), strict=True))
