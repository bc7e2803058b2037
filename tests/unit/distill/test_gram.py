"""Gram: loss against a slow loop, gradients, blocks, and maps at the limits."""

import math

import numpy as np
import pytest
import torch

from errors import refused
from job.config import Config
from job.distill import gram
from job.distill.gram import SMALLEST, Divergence, Gram, positions
from maps import draw

WIDTHS, CHANNELS, SIDES = {1: 3, 4: 5}, {1: 4, 4: 12}, {1: 6, 4: 2}
STAGES = [1, 4]

SINGLE = [
    ([1, 2, 3, 4], "small", 8, "stages among 1 2 3, or "),
    ([4], "imagenet", 32, "stages among 1 2 3, or "),
    ([1, 4], "imagenet", 8, "stages among 1, or "),
]


def new(stages=STAGES, **options):
    options = {"loss_factor": 1.0, "teacher": "t.pth", "gram_stages": stages, **options}
    return Gram(Config(**options), WIDTHS, None)


def loss(distiller, student, teacher):
    return distiller.loss(student, distiller.targets(teacher, torch.Generator()))


def windows(size, side):
    """Return the smallest windows of a map's rows or columns, if at most `side` are allowed."""
    length = next(k for k in range(1, size + 1) if math.ceil(size / k) <= side)
    return [slice(first, first + length) for first in range(0, size, length)]


def softmax_rows(image, tau, side):
    """Convert an image's maps (C, H, W) to a row of probabilities for each position."""
    C, H, W = image.shape
    length = max(H, W)
    rows, columns = windows(length, side), windows(length, side)
    features = [image[:, y, x].mean((1, 2)) for y in rows for x in columns if image[:, y, x].size]
    norms = [np.linalg.norm(f) for f in features]
    features = [f / n if n > SMALLEST else 0 * f for f, n in zip(features, norms, strict=True)]
    actual = []
    for a in features:
        exponentials = [math.exp(float(a @ b) / tau) for b in features]
        actual.append([value / sum(exponentials) for value in exponentials])
    return actual


def divergence(p_row, q_row):
    return sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True))


def plainly(student, teacher, tau=0.07, side=14):
    """Return the loss in float64, position by position."""
    stages = []
    for name in student:
        divergences = []
        images = (maps[name].double().numpy() for maps in (teacher, student))
        for t, s in zip(*images, strict=True):
            rows = zip(softmax_rows(t, tau, side), softmax_rows(s, tau, side), strict=True)
            divergences += [divergence(p_row, q_row) for p_row, q_row in rows]
        stages.append(np.mean(divergences))
    return np.mean(stages)


@pytest.mark.parametrize("stages", [[1, 4], [4]])
@pytest.mark.parametrize(("tau", "factor"), [(0.07, 1.0), (0.5, 8.0)])
def test_loss_equals_formula(stages, tau, factor):
    student, teacher = draw(WIDTHS, SIDES, stages, mean=1.0), draw(CHANNELS, SIDES, stages)
    distiller = new(stages, gram_tau=tau, loss_factor=factor)
    expected = plainly(student, teacher, tau) / factor
    assert loss(distiller, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", [2, 3, 5])
def test_large_maps_are_averaged_in_windows(monkeypatch, side):
    """The maps have 6 x 5 positions, and the last windows are incomplete."""
    monkeypatch.setattr(gram, "SIDE", side)
    student, teacher = draw(WIDTHS, SIDES, [1]), draw(CHANNELS, SIDES, [1])
    assert positions(student["layer1"]).shape[2] == {2: 4, 3: 9, 5: 9}[side]
    actual = loss(new([1]), student, teacher).item()
    assert actual == pytest.approx(plainly(student, teacher, side=side), rel=1e-5)


@pytest.mark.parametrize(("size", "side"), [(56, 14), (28, 14), (24, 12), (15, 8), (14, 14)])
def test_positions_are_at_most_14_by_14(size, side):
    assert positions(torch.zeros(1, 2, size, size)).shape == (1, 2, side**2)


def test_divergence_gradient_is_exact():
    s = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda features: Divergence.apply(features, t), (s,))


def test_blocks_do_not_change_loss_or_gradient(monkeypatch):
    def actual(numbers):
        monkeypatch.setattr(gram, "NUMBERS", numbers)
        student = draw(WIDTHS, SIDES, [1])["layer1"].requires_grad_()
        value = loss(new([1]), {"layer1": student}, draw(CHANNELS, SIDES, [1]))
        value.backward()
        return value.detach(), student.grad

    in_one_block = actual(10**6)
    for numbers in (1, 2 * 30**2):  # one image, and two of five, of 30 positions each
        for blockwise, expected in zip(actual(numbers), in_one_block, strict=True):
            torch.testing.assert_close(blockwise, expected)


def test_loss_is_mean_over_images():
    """So the loss does not depend on the number of workers."""
    student, teacher = draw(WIDTHS, SIDES, STAGES), draw(CHANNELS, SIDES, STAGES)
    distiller = new()

    def one(maps, image):
        return {name: value[image : image + 1] for name, value in maps.items()}

    losses = [loss(distiller, one(student, i), one(teacher, i)).item() for i in range(5)]
    assert loss(distiller, student, teacher).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_equal_maps_have_no_loss_or_gradient():
    student = {name: maps.requires_grad_() for name, maps in draw(WIDTHS, SIDES, STAGES).items()}
    actual = loss(new(), student, {name: 3 * maps.detach() for name, maps in student.items()})
    actual.backward()
    assert abs(actual.item()) < 1e-6
    assert all(maps.grad.abs().max() < 1e-5 for maps in student.values())


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-6])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one-position", "all"])
def test_zero_position_has_no_gradient(size, everywhere):
    """It resembles all positions equally."""
    student = draw(WIDTHS, SIDES, [1])["layer1"]
    zeros = np.s_[:] if everywhere else np.s_[..., 0, 0]
    student[zeros] *= size
    student.requires_grad_()
    teacher = draw(CHANNELS, SIDES, [1])
    actual = loss(new([1]), {"layer1": student}, teacher)
    actual.backward()
    assert actual.item() == pytest.approx(plainly({"layer1": student.detach()}, teacher), rel=1e-5)
    assert student.grad.abs().max() < 10 and not student.grad[zeros].any()


def test_loss_is_float32_under_autocast():
    student, teacher = draw(WIDTHS, SIDES, STAGES), draw(CHANNELS, SIDES, STAGES)
    expected = loss(new(), student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(new(), student, teacher), expected)


@pytest.mark.parametrize(("stages", "stem", "size", "fix"), SINGLE)
def test_gram_refuses_stage_of_one_position(stages, stem, size, fix):
    """A position needs another one to compare it with."""
    message = refused(new, stages, stem=stem, image_size=size)
    given = " ".join(map(str, stages))
    assert message == (
        f"--gram-stages {given}: the maps of layer4 have 1 x 1 positions "
        f"with --image-size {size}; expected at least 2. Choose {fix}a larger --image-size"
    )


@pytest.mark.parametrize(
    ("stages", "stem", "size"),
    [([1, 2, 3, 4], "small", 9), ([1, 2, 3], "small", 8), ([4], "imagenet", 33)],
)
def test_gram_accepts_two_by_two_positions(stages, stem, size):
    assert new(stages, stem=stem, image_size=size).config.gram_stages == stages


def test_loss_refuses_other_map_size():
    student, teacher = draw(WIDTHS, {4: 3}, [4]), draw(CHANNELS, {4: 2}, [4])
    message = refused(loss, new([4]), student, teacher)
    assert "layer4 have 2 x 1 positions; expected 3 x 2" in message


def test_gram_has_no_parameters():
    distiller = new()
    assert list(distiller.module.state_dict()) == ["factor"]
    assert not list(distiller.module.parameters())
