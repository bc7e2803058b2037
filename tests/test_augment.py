import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional

from moco.augment import MEAN, STD, GaussianBlur, centre_view, normalize, random_view


def picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(colour, size=8):
    return Image.new("RGB", (size, size), colour)


def views(aug_plus, image, number, size=8):
    torch.manual_seed(0)
    view = random_view(size, aug_plus)
    return torch.stack([view(image) for _ in range(number)])


both_versions = pytest.mark.parametrize("aug_plus", [False, True])


@both_versions
@pytest.mark.parametrize("size", [1, 16, 33])
@pytest.mark.parametrize(("width", "height"), [(40, 30), (7, 50), (16, 16)])
def test_a_random_view_is_a_square_of_bytes(aug_plus, size, width, height):
    view = random_view(size, aug_plus)(picture(width, height))
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8


@pytest.mark.parametrize("crop_min", [0.2, 0.9])
def test_a_random_view_shows_at_least_the_share_that_is_asked_for(crop_min):
    """Of an image whose left half is white and whose right half is black: near-whole views show both."""
    image = Image.new("RGB", (40, 40), "white")
    image.paste("black", (20, 0, 40, 40))
    torch.manual_seed(0)
    view = random_view(16, False, crop_min)
    plain = sum(int(view(image).float().std() < 1) for _ in range(200))
    assert plain > 0 if crop_min == 0.2 else plain == 0


@both_versions
def test_a_random_view_is_a_function_of_the_seed(aug_plus):
    view, image = random_view(16, aug_plus), picture()

    def drawn(seed):
        torch.manual_seed(seed)
        return [view(image) for _ in range(8)]

    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))


@both_versions
def test_random_views_draw_from_torch_alone(aug_plus):
    """The data loader seeds torch for each view; another generator would not be seeded."""
    image, drawn = picture(), []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        drawn.append(views(aug_plus, image, 8, size=16))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("aug_plus", "low", "high"), [(False, 0, 0), (True, 70, 130)])
def test_version_two_blurs_half_of_the_views_and_version_one_none(aug_plus, low, high, monkeypatch):
    blurred = []
    monkeypatch.setattr(GaussianBlur, "__call__", lambda self, image: blurred.append(image) or image)
    views(aug_plus, plain("red"), 200)
    assert low <= len(blurred) <= high


def test_blur_is_that_of_its_radius():
    image = picture()
    assert GaussianBlur(1.5, 1.5)(image).tobytes() == image.filter(ImageFilter.GaussianBlur(1.5)).tobytes()


def test_blur_radii_are_between_a_tenth_and_two(monkeypatch):
    radii, blur = [], ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or blur(radius))
    torch.manual_seed(0)
    for _ in range(300):
        GaussianBlur()(plain("red", 2))
    assert 0.1 <= min(radii) < 0.2
    assert 1.9 < max(radii) <= 2.0
    assert 0.9 < np.mean(radii) < 1.2


@both_versions
def test_a_fifth_of_the_views_are_grey(aug_plus):
    drawn = views(aug_plus, plain((200, 60, 60)), 400)
    grey = (drawn == drawn[:, :1]).flatten(1).all(1)
    assert 0.14 < grey.float().mean() < 0.27


@pytest.mark.parametrize(("aug_plus", "low", "high"), [(False, 0, 0.03), (True, 0.10, 0.24)])
def test_version_two_leaves_the_colours_of_some_views(aug_plus, low, high):
    """Neither jittered (0.2) nor grey (0.8 of those), which is 0.16 of version two."""
    red = plain((200, 60, 60))
    drawn = views(aug_plus, red, 400)
    as_it_was = (drawn == functional.pil_to_tensor(red)[None]).flatten(1).all(1)
    assert low <= as_it_was.float().mean() <= high


@pytest.mark.parametrize(("aug_plus", "largest"), [(False, 0.4), (True, 0.1)])
def test_hues_shift_by_up_to_the_version_s_share_of_the_circle(aug_plus, largest):
    drawn = views(aug_plus, plain((180, 60, 60)), 300)[:, :, 4, 4] / 255
    hues = [colorsys.rgb_to_hsv(*colour) for colour in drawn.tolist()]
    shifts = [min(h, 1 - h) for h, saturation, _ in hues if saturation > 0.05]
    assert 0.8 * largest < max(shifts) < largest + 0.02


@both_versions
def test_brightness_changes_by_up_to_four_tenths(aug_plus, monkeypatch):
    factors = []
    adjust = functional.adjust_brightness
    monkeypatch.setattr(functional, "adjust_brightness", lambda image, f: factors.append(f) or adjust(image, f))
    views(aug_plus, plain("red"), 200)
    assert 0.6 <= min(factors) < 0.65
    assert 1.35 < max(factors) <= 1.4


@both_versions
def test_crops_cover_a_fifth_to_the_whole_of_the_image(aug_plus, monkeypatch):
    areas, crop = [], functional.resized_crop

    def record(image, top, left, height, width, *rest, **named):
        areas.append(height * width / (image.width * image.height))
        return crop(image, top, left, height, width, *rest, **named)

    monkeypatch.setattr(functional, "resized_crop", record)
    views(aug_plus, plain("red", 100), 200)
    assert 0.19 < min(areas) < 0.25
    assert 0.9 < max(areas) <= 1.0


@both_versions
def test_half_of_the_views_are_flipped(aug_plus):
    ramp = np.broadcast_to(np.arange(0, 160, 5, dtype=np.uint8)[None, :, None], (32, 32, 3))
    drawn = views(aug_plus, Image.fromarray(ramp.copy()), 200, size=16).float().sum((1, 2))
    assert 0.4 < (drawn[:, 0] > drawn[:, -1]).float().mean() < 0.6


def slow_centre(image, size):
    """Resize the shorter side with the border, and cut the middle out of the pixels."""
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    sides = [short if side == min(image.size) else int(side * scale) for side in image.size]
    small = np.asarray(image.resize(sides, Image.BILINEAR))
    top, left = (round((length - size) / 2) for length in small.shape[:2])
    return torch.from_numpy(small[top : top + size, left : left + size].copy()).permute(2, 0, 1)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 48), (41, 100), (20, 33), (500, 20)])
@pytest.mark.parametrize("size", [14, 28, 56])
def test_centre_view_is_the_middle_of_the_image(width, height, size):
    image = picture(width, height)
    view = centre_view(size)(image)
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8
    assert torch.equal(view, slow_centre(image, size))


def test_centre_view_has_the_usual_border():
    assert torch.equal(centre_view(224)(picture(256, 256)), functional.pil_to_tensor(picture(256, 256))[:, 16:240, 16:240])


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300)])
def test_centre_view_leaves_out_both_ends_alike(width, height):
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2 - 50, height // 2 - 50, width // 2 + 50, height // 2 + 50))
    assert torch.equal(centre_view(28)(image), functional.pil_to_tensor(plain("blue", 28)))


def test_normalize_equals_torchvisions():
    images = [picture(9, 7, seed) for seed in range(3)]
    images[0].paste((0, 255, 0), (0, 0, 4, 4))
    torchvisions = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
    )
    expected = torch.stack([torchvisions(image) for image in images])
    found = normalize(torch.stack([functional.pil_to_tensor(image) for image in images]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_every_byte_of_every_channel_is_normalised_by_the_formula():
    found = normalize(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16))
    for channel in range(3):
        expected = [(byte / 255 - MEAN[channel]) / STD[channel] for byte in range(256)]
        torch.testing.assert_close(found[0, channel].flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_normalised_bytes_are_channels_last():
    found = normalize(torch.zeros(2, 3, 5, 6, dtype=torch.uint8))
    assert found.shape == (2, 3, 5, 6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_passes_floats(dtype):
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = images.clone()
    found = normalize(images)
    assert found.dtype == dtype
    assert torch.equal(found, before)


def test_normalize_leaves_its_bytes_as_they_were():
    images = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    normalize(images)
    assert torch.equal(images, torch.full((1, 3, 2, 2), 7, dtype=torch.uint8))
