"""Each operation on one image compared with torchvision's. Tolerances are levels of 255."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from job.data.augment import FACTORS, FLIP, NONE, OPERATIONS, SIGMA, RandomView
from job.data.render import LUMA, blur, brightness, contrast, hue, render, saturation
from pictures import PICTURES, appearance, grey, noise, photo, plain, ramp, vivid

on_pictures = pytest.mark.parametrize("image", PICTURES.values(), ids=PICTURES.keys())
FACTORS_TRIED = [0.6, 0.75, 0.983, 1.0, 1.2, 1.4]
SHIFTS = [-0.4, -0.1, -0.02, 0.0, 0.05, 0.1, 0.4]


def difference(image, other):
    """Return grey levels between two images, or between an image and a number of them."""
    return np.abs(np.asarray(image).astype(float) - np.asarray(other).astype(float))


@on_pictures
@pytest.mark.parametrize("factor", FACTORS_TRIED)
@pytest.mark.parametrize(
    ("operation", "theirs"),
    [
        (brightness, functional.adjust_brightness),
        (contrast, functional.adjust_contrast),
        (saturation, functional.adjust_saturation),
    ],
)
def test_colours_match_torchvision_within_a_level(image, factor, operation, theirs):
    expected = theirs(Image.fromarray(image), factor)
    assert difference(operation(image, factor), expected).max() <= 1


@on_pictures
@pytest.mark.parametrize("operation", [brightness, contrast, saturation])
def test_factor_of_one_changes_no_pixel(image, operation):
    assert (operation(image, 1.0) == image).all()


@on_pictures
@pytest.mark.parametrize("factor", FACTORS_TRIED)
def test_colours_follow_their_formulas(image, factor):
    """Contrast rounds its mean grey, as PIL does: 0.2 levels. Saturation's matrix: 0.25."""
    values, luma = image.astype(float), image @ LUMA.astype(float)
    mean = luma.mean()
    for actual, exact, tolerance in (
        (brightness(image, factor), factor * values, 0.5),
        (contrast(image, factor), factor * values + (1 - factor) * mean, 0.71),
        (saturation(image, factor), factor * values + (1 - factor) * luma[:, :, None], 0.75),
    ):
        assert difference(actual, exact.clip(0, 255)).max() <= tolerance + 1e-3


@on_pictures
def test_saturation_zero_is_torchvision_s_grey(image):
    actual = saturation(image, 0.0)
    assert (actual == actual[:, :, :1]).all()
    off = difference(actual, functional.to_grayscale(Image.fromarray(image), 3))
    assert off.max() <= 1
    assert off.mean() < 0.05


@on_pictures
@pytest.mark.parametrize("shift", SHIFTS)
def test_hue_matches_torchvision(image, shift):
    """Both have 256 hues. PIL rounds hue and shift down, and a step is up to six levels."""
    off = difference(hue(image, shift), functional.adjust_hue(Image.fromarray(image), shift))
    assert off.max() <= 20
    assert off.mean() <= 2.5


@on_pictures
@pytest.mark.parametrize("shift", SHIFTS)
def test_hue_follows_its_formula(image, shift):
    few = image[::4, ::4].copy()
    exact = [turned(pixel, shift) for pixel in few.reshape(-1, 3)]
    off = difference(hue(few, shift).reshape(-1, 3), 255 * np.array(exact))
    assert off.max() <= 13
    assert off.mean() <= 1.6


def turned(pixel, shift):
    h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
    return colorsys.hsv_to_rgb((h + shift) % 1, s, v)


@pytest.mark.parametrize("shift", SHIFTS)
def test_hue_leaves_greys(shift):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert (hue(every, shift) == every).all()


def test_hue_third_turns_red_to_green_to_blue():
    red, green, blue = (plain(colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert difference(hue(red, 1 / 3), green).max() <= 6
    assert difference(hue(red, -1 / 3), blue).max() <= 6
    assert difference(hue(blue, -1 / 3), green).max() <= 6


@on_pictures
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.9, 1.4, 2.0])
def test_blur_matches_torchvision(image, sigma):
    expected = functional.gaussian_blur(Image.fromarray(image), 2 * round(3 * sigma) + 1, sigma)
    off = difference(blur(image, sigma), expected)
    assert off.max() <= 1
    assert off.mean() < 0.01


def steps(image):
    """Return the mean of the squared steps from pixel to pixel, which a blur reduces."""
    return np.square(np.diff(np.asarray(image).astype(float), axis=1)).mean()


@pytest.mark.parametrize("sigma", [0.5, 0.7, 0.9, 1.4, 2.0])
@pytest.mark.parametrize("make", [photo, vivid, grey])
def test_blur_nearly_matches_pil_on_smooth_images(sigma, make):
    """PIL approximates by boxes, and continues the border differently."""
    for seed in range(3):
        image = make(seed)
        expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
        off = difference(blur(image, sigma), expected)
        assert off.mean() < 1.5
        assert (off > 4).mean() < 0.05
        assert steps(blur(image, sigma)) == pytest.approx(steps(expected), rel=0.15)


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("make", [photo, vivid])
def test_blur_below_half_a_pixel_is_weaker_than_pil(sigma, make):
    """Samples of such a Gaussian, a pixel apart, have too small a variance. PIL's boxes do not."""
    for seed in range(3):
        image = make(seed)
        theirs = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
        assert (
            0.7 * steps(image)
            < steps(theirs)
            <= steps(blur(image, sigma)) * 1.001
            <= steps(image) * 1.001
        )


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_keeps_plain_and_spreads_a_dot(sigma):
    assert (blur(plain((255, 3, 77), 9, 9), sigma) == plain((255, 3, 77), 9, 9)).all()
    dot = plain((0, 0, 0), 41, 41)
    dot[20, 20] = 255
    distance = np.arange(-20, 21)
    weights = np.exp(-0.5 * np.square(distance / sigma)) * (np.abs(distance) <= 3 * sigma + 0.5)
    weights /= weights.sum()
    assert difference(blur(dot, sigma), 255 * np.outer(weights, weights)[:, :, None]).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 5), (3, 3)])
def test_blur_accepts_small_images(shape):
    image = noise(0, *shape)
    actual = blur(image, 2.0)
    assert actual.shape == image.shape
    assert difference(actual, actual.mean((0, 1))).max() < difference(
        image, image.mean((0, 1))
    ).max() or shape == (1, 1)


# Complete appearances.


@on_pictures
def test_render_neutral_appearance_keeps_bytes(image):
    assert (render(image, appearance()) == image).all()


@on_pictures
def test_render_flip_mirrors(image):
    assert (render(image, appearance(flip=True)) == image[:, ::-1]).all()


def test_render_operations_have_their_numbers():
    image = photo(0)
    for number, (operation, factor) in enumerate(
        [(brightness, 0.7), (contrast, 0.7), (saturation, 0.7), (hue, 0.1)]
    ):
        assert (
            render(image, appearance((number, factor)))
            == operation(image, np.float32(factor).item())
        ).all()


def test_render_applies_operations_in_order():
    image, bright = photo(0), np.float32(1.4).item()
    first, last = (
        render(image, appearance((0, 1.4), (1, 0.6))),
        render(image, appearance((1, 0.6), (0, 1.4))),
    )
    dull = np.float32(0.6).item()
    assert (first == contrast(brightness(image, bright), dull)).all()
    assert (last == brightness(contrast(image, dull), bright)).all()
    assert difference(first, last).max() > 20  # one clips the values that the other keeps


def test_render_skips_missing_operations():
    image = photo(0)
    gaps = appearance((NONE, 0.3), (0, 1.3), (NONE, 0.0), (3, 0.1), (NONE, 5.0))
    assert (render(image, gaps) == render(image, appearance((0, 1.3), (3, 0.1)))).all()


def test_render_blurs_then_flips_last():
    image = photo(0)
    actual = render(image, appearance((0, 1.4), (2, 0.0), sigma=1.5, flip=True))
    assert (
        actual == blur(saturation(brightness(image, np.float32(1.4).item()), 0.0), 1.5)[:, ::-1]
    ).all()


@pytest.mark.parametrize("aug_plus", [False, True])
def test_render_matches_torchvision_operations(aug_plus):
    """Up to five operations are rounded, and later ones multiply the steps of hues."""
    theirs = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    view, random, pictures = (
        RandomView(8, aug_plus),
        np.random.default_rng(0),
        list(PICTURES.values()),
    )
    for number in range(120):
        image, row = pictures[number % len(pictures)], view.appearance(random)
        expected = Image.fromarray(image)
        for operation, factor in zip(
            row[OPERATIONS].astype(int), row[FACTORS].tolist(), strict=True
        ):
            if operation != NONE:
                expected = theirs[operation](expected, factor)
        if row[SIGMA]:
            reach = round(3 * row[SIGMA].item())
            expected = functional.gaussian_blur(expected, 2 * reach + 1, row[SIGMA].item())
        if row[FLIP]:
            expected = functional.hflip(expected)
        assert difference(render(image, row), expected).mean() <= 4


@pytest.mark.parametrize("aug_plus", [False, True])
def test_render_does_not_change_its_image(aug_plus):
    image, view, random = ramp(), RandomView(8, aug_plus), np.random.default_rng(0)
    before = image.copy()
    for _ in range(50):
        actual = render(image, view.appearance(random))
        assert actual.dtype == np.uint8
        assert actual.shape == image.shape
        assert (image == before).all()


def test_render_accepts_views_of_memory():
    """The memory is a tensor's with channels first, or has a step."""
    image, row = photo(0), appearance((0, 0.8), (1, 1.2), (2, 0.7), (3, 0.1), sigma=1.0, flip=True)
    first = torch.from_numpy(image).permute(2, 0, 1).contiguous().permute(1, 2, 0).numpy()
    assert not first.flags.c_contiguous
    assert (render(first, row) == render(image, row)).all()
    assert (render(image[::2, ::2], row) == render(image[::2, ::2].copy(), row)).all()
