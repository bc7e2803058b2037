"""Appearances of a batch compared with single images, torchvision's operations, and formulas.

On the CPU, and on a visible GPU: tests/conftest.py hides it, --noconftest does not. Tolerances are
levels of 255.
"""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import functional

from job.data import render
from job.data.augment import OPERATIONS, RandomView
from job.data.render_batch import (
    BRIGHTNESS,
    CONTRAST,
    LUMA,
    RADIUS,
    SATURATION,
    hue,
    mix,
    mix_weights,
)
from job.data.render_batch import render as render_batch
from pictures import PICTURES, appearance, noise, photo, plain

IMAGES = np.stack(list(PICTURES.values()))  # (12, 60, 80, 3)
SHAPES = [(7, 7), (8, 13), (20, 9), (40, 24)]
KINDS = {
    "nothing": {},
    "brightness": {"operations": [(0, 1.3)]},
    "contrast": {"operations": [(1, 0.7)]},
    "saturation": {"operations": [(2, 1.4)]},
    "hue": {"operations": [(3, 0.1)]},
    "grey": {"operations": [(2, 0.0)]},
    "blur": {"sigma": 1.3},
    "flip": {"flip": True},
    "all": {"operations": [(3, -0.1), (1, 1.2), (0, 0.8), (2, 0.6)], "sigma": 2.0, "flip": True},
}


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def rendered(request):
    """A function: images (B, H, W, 3), appearances (B, 12) -> rendered images (B, H, W, 3)."""

    def on_device(images, appearances):
        batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(request.param)
        actual = render_batch(batch, torch.from_numpy(np.stack(list(appearances))))
        assert (actual.device, actual.dtype, actual.shape) == (
            batch.device,
            torch.uint8,
            batch.shape,
        )
        return actual.permute(0, 2, 3, 1).cpu().numpy()

    return on_device


def one(kind):
    """Return the appearance of one of KINDS."""
    return appearance(
        *KINDS[kind].get("operations", []),
        **{k: v for k, v in KINDS[kind].items() if k != "operations"},
    )


def drawn(aug_plus, number, seed=0):
    """Return appearances of random views, (number, 12)."""
    view, random = RandomView(8, aug_plus), np.random.default_rng(seed)
    return np.stack([view.appearance(random) for _ in range(number)])


def difference(one, other):
    """Return grey levels between images."""
    return np.abs(np.asarray(one).astype(float) - np.asarray(other).astype(float))


# Against one image at a time.


@pytest.mark.parametrize("aug_plus", [False, True])
def test_render_batch_matches_single_images(rendered, aug_plus):
    """Single images round each operation, and have 256 hues: up to 18 levels in total."""
    rows = drawn(aug_plus, 240)
    images = IMAGES[np.arange(240) % len(IMAGES)]
    off = difference(
        rendered(images, rows),
        np.stack([render.render(*each) for each in zip(images, rows, strict=True)]),
    )
    assert off.mean((1, 2, 3)).max() < 2
    assert off.mean() < 0.7
    assert off.max() <= 24
    hueless = ~(rows[:, OPERATIONS] == 3).any(1)
    if aug_plus:  # version one moves all hues
        assert hueless.any() and off[hueless].max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 3])
def test_render_batch_of_one_operation_matches(rendered, kind, number):
    """The operation applies to no image, to some, or to all."""
    images, row = IMAGES[:number], one(kind)
    off = difference(
        rendered(images, [row] * number), np.stack([render.render(image, row) for image in images])
    )
    assert off.max() <= {"nothing": 0, "flip": 0, "hue": 12, "all": 12}.get(kind, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_render_batch_accepts_any_shape(rendered, shape):
    images = np.stack([noise(seed, *shape) for seed in range(len(KINDS))])
    rows = [one(kind) for kind in KINDS]
    for image, row, actual, kind in zip(images, rows, rendered(images, rows), KINDS, strict=True):
        assert difference(actual, render.render(image, row)).max() <= {"hue": 20, "all": 12}.get(
            kind, 1
        ), kind


# Each operation.


@pytest.mark.parametrize("factor", [0.6, 0.75, 0.983, 1.0, 1.2, 1.4])
@pytest.mark.parametrize(
    ("number", "theirs"),
    [
        (0, functional.adjust_brightness),
        (1, functional.adjust_contrast),
        (2, functional.adjust_saturation),
    ],
)
def test_colours_match_torchvision_within_a_level(rendered, factor, number, theirs):
    actual = rendered(IMAGES, [appearance((number, factor))] * len(IMAGES))
    expected = np.stack([np.asarray(theirs(Image.fromarray(image), factor)) for image in IMAGES])
    assert difference(actual, expected).max() <= 1


@pytest.mark.parametrize("shift", [-0.4, -0.1, -0.02, 0.0, 0.05, 0.1, 0.4])
def test_hue_matches_torchvision_to_pil_s_steps(rendered, shift):
    actual = rendered(IMAGES, [appearance((3, shift))] * len(IMAGES))
    expected = np.stack(
        [np.asarray(functional.adjust_hue(Image.fromarray(image), shift)) for image in IMAGES]
    )
    assert difference(actual, expected).max() <= 18
    assert difference(actual, expected).mean((1, 2, 3)).max() <= 1.8


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.983, 1.0, 1.4])
def test_colours_follow_their_formulas(factor):
    values = IMAGES.astype(float)
    luma = values @ np.array(LUMA)
    images = torch.from_numpy(values).float().permute(0, 3, 1, 2)
    for operation, exact in (
        (BRIGHTNESS, factor * values),
        (CONTRAST, factor * values + (1 - factor) * luma.mean((1, 2))[:, None, None, None]),
        (SATURATION, factor * values + (1 - factor) * luma[:, :, :, None]),
    ):
        [weights] = mix_weights(torch.tensor([[operation]]), torch.tensor([[factor]]))
        actual = mix(images, weights.expand(len(IMAGES), 3)).permute(0, 2, 3, 1)
        assert difference(actual, exact.clip(0, 255)).max() < 1e-3


def test_hue_follows_its_formula():
    """Random colours, greys, and the six at which the strongest channel changes."""
    corners = [
        (255, 0, 0),
        (255, 255, 0),
        (0, 255, 0),
        (0, 255, 255),
        (0, 0, 255),
        (255, 0, 255),
        (0, 0, 0),
        (9, 9, 9),
    ]
    colours = np.concatenate([corners, noise(0, 20, 20).reshape(-1, 3)]).astype(float)
    for shift in (-0.4, -0.1, 0.0, 1 / 3, 0.37, 0.5):
        actual = hue(
            torch.from_numpy(colours).float().view(-1, 3, 1, 1),
            torch.full((len(colours), 1, 1, 1), shift),
        )
        exact = []
        for h, s, v in (colorsys.rgb_to_hsv(*colour) for colour in colours / 255):
            exact.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
        assert difference(actual[:, :, 0, 0], 255 * np.array(exact)).max() < 1e-2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_follows_its_formula(rendered, shape, sigma):
    """The border is mirrored."""
    image, distance = noise(1, *shape), np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-0.5 * np.square(distance / sigma)) * (np.abs(distance) <= round(3 * sigma))
    wide = np.pad(image.astype(float), ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)), mode="reflect")
    for axis in (0, 1):
        wide = np.apply_along_axis(np.convolve, axis, wide, weights / weights.sum(), "valid")
    assert difference(rendered(image[None], [appearance(sigma=sigma)])[0], wide).max() <= 0.5 + 1e-3


def test_blur_keeps_plain_images(rendered):
    image = plain((255, 3, 77), 9, 9)
    assert (
        rendered(
            image[None].repeat(4, 0), [appearance(sigma=sigma) for sigma in (0.1, 0.5, 1.0, 2.0)]
        )
        == image
    ).all()


@pytest.mark.parametrize("aug_plus", [False, True])
def test_grey_views_have_equal_channels(rendered, aug_plus):
    """Version one shifts the hue of grey images."""
    rows = drawn(aug_plus, 200)
    rows = rows[((rows[:, OPERATIONS] == 2) & (rows[:, 5:10] == 0)).any(1)]
    actual = rendered(IMAGES[np.arange(len(rows)) % len(IMAGES)], rows)
    assert len(rows) > 20
    assert (actual == actual[..., :1]).all()


# The batch.


def test_render_batch_keeps_each_image_s_order(rendered):
    rows = [
        appearance((0, 1.4), (1, 0.6)),
        appearance((1, 0.6), (0, 1.4)),
        appearance((-1, 9.0), (1, 0.6), (-1, 0.0), (0, 1.4)),
    ]
    image = photo(0)
    first, last, gaps = rendered(np.stack([image] * 3), rows)
    assert difference(first, last).max() > 20  # one clips the values that the other keeps
    assert (last == gaps).all()
    assert difference(first, render.render(image, rows[0])).max() <= 1
    assert difference(last, render.render(image, rows[1])).max() <= 1


@pytest.mark.parametrize("aug_plus", [False, True])
def test_render_batch_images_are_independent(rendered, aug_plus):
    """An image gives the same in a batch of one, of all, and in another order, to rounding."""
    rows, order = drawn(aug_plus, 24), np.random.default_rng(1).permutation(24)
    images = IMAGES[np.arange(24) % len(IMAGES)]
    together, shuffled = rendered(images, rows), rendered(images[order], rows[order])
    single = np.concatenate([rendered(images[[index]], rows[[index]]) for index in range(24)])
    for actual in (shuffled, together[order]):
        off = difference(actual, single[order])
        assert off.max() <= 1
        assert off.mean() < 1e-3


def test_render_batch_does_not_change_its_images():
    first = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    rows = torch.from_numpy(drawn(True, len(IMAGES)))
    expected = render_batch(first, rows)
    assert (first.permute(0, 2, 3, 1).numpy() == np.stack(list(PICTURES.values()))).all()
    assert torch.equal(render_batch(first.contiguous(), rows), expected)


@pytest.mark.parametrize("aug_plus", [False, True])
def test_render_batch_copies_no_values_to_the_host(aug_plus):
    """Images on the meta device have no values, so an operation that reads them fails."""
    images = torch.empty(24, 3, 16, 16, dtype=torch.uint8, device="meta")
    actual = render_batch(images, torch.from_numpy(drawn(aug_plus, 24)))
    assert (actual.device, actual.shape, actual.dtype) == (
        images.device,
        images.shape,
        images.dtype,
    )


@pytest.mark.parametrize("aug_plus", [False, True])
def test_render_batch_needs_few_operations(aug_plus):
    """A GPU starts a kernel for each operation, whatever the number of images."""
    images = torch.empty(256, 3, 16, 16, dtype=torch.uint8, device="meta")
    with DeviceOperations() as counted:
        render_batch(images, torch.from_numpy(drawn(aug_plus, 256)))
    assert 50 < counted.number <= 120


class DeviceOperations(TorchDispatchMode):
    """Count the operations that compute tensors of the meta device."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.number += not operation.is_view and any(each.is_meta for each in tensors)
        return result
