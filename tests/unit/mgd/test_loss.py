import pytest
import torch

from mgd.loss import partial_l2


def slow_partial_l2(student, target, margin):
    """The definition, one element at a time, in doubles."""
    loss = 0.0
    for s_image, t_image in zip(student, target, strict=True):
        for s_map, t_map, m in zip(s_image, t_image, margin.tolist(), strict=True):
            for s, t in zip(s_map.flatten().tolist(), t_map.flatten().tolist(), strict=True):
                t = max(t, m)
                if s > t or t > 0:
                    loss += (s - t) ** 2
    return loss


def case(B, S, H, W, seed=0):
    random = torch.Generator().manual_seed(seed)
    student, target = torch.randn(2, B, S, H, W, generator=random)
    return student, 1.5 * target, -torch.rand(S, generator=random)


SHAPES = [(2, 3, 4, 5), (1, 4, 3, 3), (5, 2, 1, 1), (1, 1, 1, 1), (3, 6, 2, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_loss_is_the_partial_distance_summed_over_elements(shape, seed):
    loss = partial_l2(*case(*shape, seed))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_partial_l2(*case(*shape, seed)), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "target", "margin", "expected"),
    [
        (2.0, 1.0, -0.5, 1.0),
        (0.5, 1.0, -0.5, 0.25),
        (-2.0, 1.0, -0.5, 9.0),  # below a positive target: pulled up
        (
            1.0,
            -3.0,
            -0.5,
            2.25,
        ),  # above a silent teacher: pulled down, to the margin and no further
        (-0.2, -0.3, -0.5, 0.01),
        (-0.4, -0.3, -0.5, 0.0),  # below a silent teacher: as silent as it should be
        (-0.6, -3.0, -0.5, 0.0),
        (-1.0, 0.0, -0.5, 0.0),  # a target of zero is not positive
        (0.5, 0.0, -0.5, 0.25),
        (-0.3, -0.3, -0.5, 0.0),
    ],
)
def test_one_element(student, target, margin, expected):
    element = [torch.full((1, 1, 1, 1), value) for value in (student, target)]
    assert partial_l2(*element, torch.tensor([margin])).item() == pytest.approx(expected, abs=1e-6)


def test_each_channel_has_its_own_margin():
    margin = torch.tensor([-1.0, -2.0, -3.0])
    loss = partial_l2(torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), -9.0), margin)
    assert loss.item() == 2 * 4 * (1 + 4 + 9)


def test_zero_and_constant_channels_follow_the_formula():
    student, target, margin = case(3, 4, 3, 3)
    student[:, 0], student[:, 1], target[:, 1], target[:, 2], margin[3] = 0.0, 0.7, 0.0, -0.4, 0.0
    assert partial_l2(student, target, margin).item() == pytest.approx(
        slow_partial_l2(student, target, margin), rel=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_finite_differences(shape):
    student, target, margin = (x.double() for x in case(*shape, seed=7))
    leaf = student.float().requires_grad_()
    partial_l2(leaf, target.float(), margin.float()).backward()
    step, numeric = 1e-5, torch.zeros_like(student)
    for i, s in enumerate(student.flatten().tolist()):
        _, a = divmod(i // (shape[2] * shape[3]), shape[1])
        t = target.flatten()[i].view(1, 1, 1, 1)
        above, below = (
            slow_partial_l2(torch.full_like(t, s + d), t, margin[a : a + 1]) for d in (step, -step)
        )
        numeric.view(-1)[i] = (above - below) / (2 * step)
    torch.testing.assert_close(leaf.grad.double(), numeric, rtol=1e-4, atol=1e-4)


def test_elements_that_do_not_count_get_no_gradient():
    student = torch.tensor([-2.0, 2.0]).view(1, 1, 1, 2).requires_grad_()
    partial_l2(student, torch.full((1, 1, 1, 2), -1.0), torch.tensor([-5.0])).backward()
    assert student.grad.flatten().tolist() == [0.0, 6.0]


@pytest.mark.parametrize("half", ["student", "target"])
def test_half_precision_is_summed_in_single(half):
    student, target, margin = case(4, 8, 14, 14)
    if half == "student":
        student = student.bfloat16()
    else:
        target, margin = target.bfloat16(), margin.bfloat16()
    loss = partial_l2(student, target, margin)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_partial_l2(student, target, margin), rel=1e-5)
