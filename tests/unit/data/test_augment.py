"""Views, crops, resizing and the normalised input."""

import colorsys
import io
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

import job.data.augment
from job.data.augment import (
    FACTORS,
    FLIP,
    MEAN,
    NONE,
    OPERATIONS,
    SATURATION,
    SIGMA,
    STD,
    CentreView,
    ClassifierView,
    Crop,
    RandomView,
    cut,
    divisor,
    draw_crop,
    drawn_view,
    normalize,
    random_crop,
    resize,
)
from job.data.images import read_image
from job.data.render import render
from pictures import noise, photo, plain, ramp


def drawing(seed=0):
    return np.random.default_rng(seed)


def views(aug_plus, image, number, size=8):
    """Return views (number, 3, size, size) uint8."""
    view, random = RandomView(size, aug_plus), drawing()
    return torch.stack([view(image, random) for _ in range(number)])


def appearances(aug_plus, number):
    """Return appearances (number, 12)."""
    view, random = RandomView(8, aug_plus), drawing()
    return np.stack([view.appearance(random) for _ in range(number)])


both_versions = pytest.mark.parametrize("aug_plus", [False, True])
VIEWS = {
    "v1": lambda size: RandomView(size, False),
    "v2": lambda size: RandomView(size, True),
    "classifier": ClassifierView,
    "centre": CentreView,
}
all_views = pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS.keys())


@all_views
@pytest.mark.parametrize("size", [1, 16, 33])
@pytest.mark.parametrize(
    ("width", "height"), [(40, 30), (7, 50), (16, 16), (500, 1), (1, 500), (3, 2), (1, 1)]
)
def test_view_is_a_uint8_square_channels_last(make, size, width, height):
    view, random, image = make(size), drawing(), noise(0, height, width)
    for _ in range(4):
        drawn = view(image, random)
        assert drawn.shape == (3, size, size)
        assert drawn.dtype == torch.uint8
        assert size == 1 or drawn.stride()[::2] == (1, 3)


@all_views
def test_view_does_not_change_its_image(make):
    """An image of the view's size, which needs no resizing, does not change either."""
    for length in (16, 18):
        image = photo(0, length, length)
        before, random = image.copy(), drawing()
        for _ in range(20):
            make(16)(image, random).fill_(7)
            assert (image == before).all()


@all_views
def test_view_accepts_a_read_slice_of_an_image(make):
    crop = photo(1, 50, 60)[3:40, 5:47]
    assert not crop.flags.c_contiguous
    assert torch.equal(make(16)(crop, drawing()), make(16)(crop.copy(), drawing()))


@pytest.mark.parametrize("crop_min", [0.2, 0.9])
def test_random_view_respects_crop_min(crop_min):
    """The image is half white, half black: a large crop shows both."""
    image = plain((255, 255, 255), 40, 40)
    image[:, 20:] = 0
    view, random = RandomView(16, False, crop_min), drawing()
    plain_ones = sum(int(view(image, random).float().std() < 1) for _ in range(200))
    assert plain_ones > 0 if crop_min == 0.2 else plain_ones == 0


@both_versions
def test_weak_view_is_a_crop_and_flip(aug_plus):
    """The same draws give the crops and flips of other views."""
    weak, other = (RandomView(16, aug_plus, weak=weak) for weak in (True, False))
    image, (one, two) = photo(0), (drawing(), drawing())
    flips = 0
    for _ in range(20):
        crop, row, drawn = weak.crop(image, one), weak.appearance(one), other(image, two)
        assert (row[OPERATIONS] == NONE).all() and row[SIGMA] == 0
        shown = torch.from_numpy(render(crop.permute(1, 2, 0).numpy(), row)).permute(2, 0, 1)
        assert torch.equal(shown, crop.flip(2) if row[FLIP] else crop)
        assert drawn.shape == shown.shape and one.random() == two.random()
        flips += int(row[FLIP])
    assert 0 < flips < 20


@pytest.mark.parametrize("make", [VIEWS[name] for name in ("v1", "v2", "classifier")])
def test_random_view_depends_only_on_its_generator(make):
    view, image = make(16), photo(0)

    def drawn(seed):
        random = drawing(seed)
        return [view(image, random) for _ in range(8)]

    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))


@pytest.mark.parametrize("make", [VIEWS[name] for name in ("v1", "v2", "classifier")])
def test_random_view_ignores_global_generators(make):
    view, image, drawn = make(16), photo(0), []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
        generator = drawing()
        drawn.append(torch.stack([view(image, generator) for _ in range(8)]))
        assert before == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
    assert torch.equal(*drawn)


@both_versions
def test_random_view_is_its_rendered_crop(aug_plus):
    view, image = RandomView(16, aug_plus), photo(2)
    at_once, in_steps = drawing(), drawing()
    for _ in range(20):
        crop, appearance = view.crop(image, in_steps), view.appearance(in_steps)
        assert (
            render(crop.permute(1, 2, 0).numpy(), appearance)
            == view(image, at_once).permute(1, 2, 0).numpy()
        ).all()


def test_appearance_always_draws_equally_often():
    """Version one also draws the numbers it does not use, so that next crops are equal."""
    one, other = drawing(), drawing()
    for _ in range(50):
        RandomView(8, True).appearance(one)
        RandomView(8, False).appearance(other)
        assert one.bit_generator.state == other.bit_generator.state


@both_versions
def test_appearance_is_twelve_floats(aug_plus):
    appearance = RandomView(8, aug_plus).appearance(drawing())
    assert appearance.shape == (12,)
    assert appearance.dtype == np.float32


@pytest.mark.parametrize(("aug_plus", "low", "high"), [(False, 0, 0), (True, 900, 1100)])
def test_appearance_blurs_half_of_v2_only(aug_plus, low, high):
    assert low <= (appearances(aug_plus, 2000)[:, SIGMA] > 0).sum() <= high


def test_appearance_blurs_uniformly():
    sigmas = appearances(True, 4000)[:, SIGMA]
    sigmas = sigmas[sigmas > 0]
    assert 0.1 <= sigmas.min() < 0.12
    assert 1.98 < sigmas.max() <= 2.0
    np.testing.assert_allclose(
        np.quantile(sigmas, [0.25, 0.5, 0.75]), [0.575, 1.05, 1.525], atol=0.08
    )


@both_versions
def test_view_is_grey_with_probability_one_fifth(aug_plus):
    drawn = views(aug_plus, plain((200, 60, 60)), 2000)
    grey = (drawn == drawn[:, :1]).flatten(1).all(1)
    assert 0.17 < grey.float().mean() < 0.23


@pytest.mark.parametrize(("aug_plus", "low", "high"), [(False, 0, 0.01), (True, 0.13, 0.19)])
def test_view_keeps_its_colours_in_v2_sometimes(aug_plus, low, high):
    """A view is neither jittered (0.2) nor grey (0.8 of the rest): 0.16 of version two."""
    drawn = views(aug_plus, plain((200, 60, 60)), 2000)
    unchanged = (drawn == torch.tensor([200, 60, 60]).view(1, 3, 1, 1)).flatten(1).all(1)
    assert low <= unchanged.float().mean() <= high


@pytest.mark.parametrize(("aug_plus", "largest"), [(False, 0.4), (True, 0.1)])
def test_view_shifts_hue_within_its_limits(aug_plus, largest):
    drawn = views(aug_plus, plain((180, 60, 60)), 500)[:, :, 4, 4] / 255
    hues = [colorsys.rgb_to_hsv(*colour) for colour in drawn.tolist()]
    shifts = [(h + 0.5) % 1 - 0.5 for h, saturation, _ in hues if saturation > 0.05]
    assert -largest - 0.01 < min(shifts) < -0.9 * largest
    assert 0.9 * largest < max(shifts) < largest + 0.01


def factors_of(drawn, number):
    """Return an operation's factors in appearances (N, 12), except those that make views grey."""
    return drawn[:, FACTORS][(drawn[:, OPERATIONS] == number) & (drawn[:, FACTORS] != 0)]


@both_versions
@pytest.mark.parametrize("number", range(3))
def test_appearance_factors_are_uniform(aug_plus, number):
    factors = factors_of(appearances(aug_plus, 2000), number)
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= np.float32(1.4)
    np.testing.assert_allclose(np.quantile(factors, [0.25, 0.5, 0.75]), [0.8, 1.0, 1.2], atol=0.03)


@pytest.mark.parametrize(("aug_plus", "fraction"), [(False, 1.0), (True, 0.8)])
def test_appearance_orders_are_uniform(aug_plus, fraction):
    drawn = appearances(aug_plus, 4800)
    orders = drawn[:, OPERATIONS][:, :4] if aug_plus else drawn[:, OPERATIONS][:, 1:]
    changed = orders[(orders != NONE).any(1)]
    assert len(changed) == pytest.approx(fraction * 4800, abs=120)
    assert (np.sort(changed) == np.arange(4)).all()
    counts = np.unique(changed, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    expected = len(changed) / 24
    # The chi-squared at a level of one in a thousand, for 23 degrees of freedom.
    assert np.square(counts - expected).sum() / expected < 50


@pytest.mark.parametrize(("aug_plus", "position"), [(False, 0), (True, 4)])
def test_appearance_greys_first_in_v1_last_in_v2(aug_plus, position):
    drawn = appearances(aug_plus, 500)
    assert set(drawn[:, OPERATIONS][:, position]) == {NONE, SATURATION}
    assert (drawn[:, FACTORS][:, position] == 0).all()


def test_appearance_draws_are_independent():
    """No two of jittered, grey, blurred, flipped, and no two of the amounts, correlate."""
    drawn = appearances(True, 6000)
    operations = drawn[:, OPERATIONS]
    jittered, flipped = operations[:, 0] != NONE, drawn[:, FLIP]
    yes_or_no = np.stack([jittered, operations[:, 4] != NONE, drawn[:, SIGMA] > 0, flipped])
    assert np.abs(np.corrcoef(yes_or_no) - np.eye(4)).max() < 0.05
    chosen = drawn[jittered & (drawn[:, SIGMA] > 0)]
    order = np.argsort(chosen[:, OPERATIONS][:, :4])
    amounts = np.concatenate(
        [np.take_along_axis(chosen[:, FACTORS], order, 1), chosen[:, [SIGMA]], chosen[:, [FLIP]]],
        axis=1,
    )
    assert np.abs(np.corrcoef(amounts.T) - np.eye(6)).max() < 0.07


@pytest.mark.parametrize("make", [VIEWS[name] for name in ("v1", "v2", "classifier")])
def test_view_is_flipped_half_of_the_time(make):
    view, random = make(16), drawing()
    drawn = torch.stack([view(ramp(), random) for _ in range(500)]).float().sum((1, 2))
    assert 0.44 < (drawn[:, 0] > drawn[:, -1]).float().mean() < 0.56


# Crops.


@pytest.fixture
def crops(monkeypatch):
    """A function (width, height, scale, number) -> (top, left, height, width) of random crops."""

    def cut(width, height, scale, number):
        image = np.zeros((height, width, 3), dtype=np.uint16)
        image[:, :, 0], image[:, :, 1] = np.arange(height)[:, None], np.arange(width)
        monkeypatch.setattr(
            job.data.augment,
            "resize",
            lambda crop, *size: (*crop[0, 0, :2].tolist(), *crop.shape[:2]),
        )
        random = drawing()
        return [random_crop(image, 8, scale, random) for _ in range(number)]

    return cut


@pytest.mark.parametrize("least", [0.08, 0.2, 0.9])
def test_random_crop_covers_all_areas_and_positions(crops, least):
    cut = np.array(crops(100, 100, (least, 1.0), 1000))
    areas, proportions = cut[:, 2] * cut[:, 3] / 1e4, cut[:, 3] / cut[:, 2]
    assert least - 0.01 < areas.min() < least + 0.05
    assert 0.9 < areas.max() <= 1.0
    if least < 0.9:
        assert 0.73 < proportions.min() < 0.77
        assert 1.3 < proportions.max() < 1.36
    for start, length in ((cut[:, 0], cut[:, 2]), (cut[:, 1], cut[:, 3])):
        assert start.min() == 0
        assert (start + length).max() == 100


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1, 500, (249, 0, 1, 1)),
        (500, 1, (0, 249, 1, 1)),
        (30, 900, (430, 0, 40, 30)),
        (900, 30, (0, 430, 30, 40)),
    ],
)
def test_random_crop_falls_back_as_torchvision(crops, width, height, expected):
    """A tenth of the image's area is wider, or higher, than the image, so no draw fits."""
    assert set(crops(width, height, (0.5, 1.0), 20)) == {expected}
    image = Image.new("L", (width, height))
    assert transforms.RandomResizedCrop.get_params(image, (0.5, 1.0), (3 / 4, 4 / 3)) == expected


@pytest.mark.parametrize(
    ("width", "height"), [(3, 2), (2, 3), (1, 1), (1, 500), (500, 1), (13, 900)]
)
def test_random_crop_stays_within_small_images(crops, width, height):
    for top, left, high, wide in crops(width, height, (0.08, 1.0), 300):
        assert 0 <= top < top + high <= height
        assert 0 <= left < left + wide <= width


# Resizing.


@pytest.mark.parametrize(
    ("height", "width"), [(14, 14), (224, 224), (37, 61), (90, 120), (1, 1), (200, 3)]
)
def test_resize_equals_pil_to_rounding(height, width):
    for image in (
        noise(0, 90, 120),
        photo(0, 90, 120),
        noise(1, 3, 2),
        photo(2, 61, 37)[5:40, 3:30],
    ):
        expected = np.asarray(
            Image.fromarray(image).resize((width, height), Image.BILINEAR)
        ).astype(int)
        difference = resize(image, height, width).permute(1, 2, 0).numpy() - expected
        assert np.abs(difference).max() <= 2
        assert (np.abs(difference) > 1).mean() < 0.001
        assert np.abs(difference.mean()) < 0.02


# Crops of reduced images.


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((63, 900), 1),
        ((64, 64), 2),
        ((900, 127), 2),
        ((128, 128), 4),
        ((256, 300), 8),
        ((9999,) * 2, 8),
    ],
)
def test_divisor_leaves_twice_the_sides_of_a_view(sides, expected):
    crop, large = Crop(0, 0, *sides, 10_000, 10_000), Crop(0, 0, 9000, 9000, 10_000, 10_000)
    assert divisor([crop], 16) == divisor([large, crop], 16) == divisor(iter([crop, large]), 16)
    assert divisor([crop], 16) == expected


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(800, 640), (801, 647)])
def test_cut_of_a_reduced_image_is_at_its_place(factor, height, width):
    """Up to a pixel of the reduced image, which is at most half a pixel of the view."""
    image, random = photo(1, height, width), drawing()
    small = cv2.resize(
        image, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA
    )
    for _ in range(20):
        crop = draw_crop(height, width, (0.2, 1.0), random)
        size = min(crop.height, crop.width) // (2 * factor)
        full, reduced = (cut(one, crop, size).float() for one in (image, small))
        assert reduced.shape == (3, size, size)
        aside = full.roll((size // 8, size // 8), (1, 2))
        assert (reduced - full).abs().mean() < 0.5 * (aside - full).abs().mean()
        assert (reduced - full).abs().mean() < 4


def test_cut_of_a_reduced_image_shows_its_edges():
    """The largest crop shows the last row and column, and no crop is empty."""
    image = plain((0, 0, 0), 401, 403)
    image[-4:], image[:, -4:] = 255, 255
    small = cv2.resize(image, (101, 101), interpolation=cv2.INTER_AREA)
    whole = cut(small, Crop(0, 0, 401, 403, 401, 403), 50)
    assert whole[:, -1].min() > 60 and whole[:, :, -1].min() > 60 and whole[:, 5, 5].max() == 0


def exact(image, size):
    """Return an image averaged over the rectangles of a view's pixels, (size, size, 3) floats."""

    def weights(length):
        edges = np.linspace(0, length, size + 1)[:, None]
        covered = np.clip(edges[1:], np.arange(length), np.arange(1, length + 1)) - np.clip(
            edges[:-1], np.arange(length), np.arange(1, length + 1)
        )
        return covered / covered.sum(1, keepdims=True)

    rows, columns = weights(image.shape[0]), weights(image.shape[1])
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(float), columns, optimize=True)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_jpeg_is_as_close_to_exact_averages(factor):
    """Views of a reduced JPEG are no further from exact averages than those of the full one."""
    full_off, reduced_off = [], []
    for seed in range(3):
        buffer = io.BytesIO()
        Image.fromarray(natural(seed, 640, 896)).save(buffer, "JPEG", quality=90)
        full = read_image(buffer.getvalue())
        small = read_image(buffer.getvalue(), lambda *_: factor)
        for top, left, height, width in ((0, 0, 640, 896), (64, 128, 512, 512), (32, 8, 384, 448)):
            size = height // (2 * factor)
            crop = Crop(top, left, height, width, 640, 896)
            expected = exact(full[top : top + height, left : left + width], size)
            for off, image in ((full_off, full), (reduced_off, small)):
                view = cut(image, crop, size).permute(1, 2, 0).numpy()
                off.append(np.abs(view - expected).mean())
    assert np.mean(reduced_off) <= np.mean(full_off)
    assert all(a <= 1.1 * b for a, b in zip(reduced_off, full_off, strict=True))


def natural(seed, height, width):
    """Return a picture with the spectrum of photographs, with sharp edges and a little noise."""
    random, scale, sides = np.random.default_rng(seed), 60.0, (3, 4)
    image = np.full((height, width, 3), 128, dtype=np.float32)
    while sides[0] <= height:
        layer = random.standard_normal((*sides, 3)).astype(np.float32)
        layer += 1.5 * layer.mean(2, keepdims=True)
        image += scale * cv2.resize(layer, (width, height), interpolation=cv2.INTER_CUBIC)
        sides, scale = (2 * sides[0], 2 * sides[1]), 0.6 * scale
    image = (image + 2 * random.standard_normal(image.shape)).clip(0, 255).astype(np.uint8)
    for _ in range(8):
        centre = random.integers(width), random.integers(height)
        colour = random.integers(0, 256, 3).tolist()
        cv2.circle(image, list(map(int, centre)), int(random.integers(20, 90)), colour, -1)
    return image


def test_draw_is_what_a_view_draws():
    """The crop and the appearance are those of a view, and as many numbers are drawn."""
    view, image, one, two = RandomView(16, True), photo(0, 90, 120), drawing(), drawing()
    for _ in range(20):
        crop, row = view.draw(90, 120, one)
        expected = view(image, two)
        assert torch.equal(drawn_view(cut(image, crop, 16), row), expected)
        assert one.bit_generator.state == two.bit_generator.state


# The centre.


def slow_centre(image, size):
    """Resize the shorter side with the border, and slice the middle."""
    image = Image.fromarray(image)
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    sides = [short if side == min(image.size) else int(side * scale) for side in image.size]
    small = np.asarray(image.resize(sides, Image.BILINEAR))
    top, left = (round((length - size) / 2) for length in small.shape[:2])
    return torch.from_numpy(small[top : top + size, left : left + size].copy()).permute(2, 0, 1)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 48), (41, 100), (20, 33), (500, 20)])
@pytest.mark.parametrize("size", [14, 28, 56])
def test_centre_view_equals_a_slow_centre_crop(width, height, size):
    for image in (noise(0, height, width), photo(0, height, width)):
        difference = (CentreView(size)(image).int() - slow_centre(image, size).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.3


def test_centre_view_has_the_usual_border():
    image = noise(0, 256, 256)
    assert torch.equal(
        CentreView(224)(image), torch.from_numpy(image[16:240, 16:240]).permute(2, 0, 1)
    )


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300)])
def test_centre_view_crops_both_ends_equally(width, height):
    image = plain((255, 0, 0), height, width)
    image[height // 2 - 50 : height // 2 + 50, width // 2 - 50 : width // 2 + 50] = (0, 0, 255)
    assert torch.equal(
        CentreView(28)(image), torch.from_numpy(plain((0, 0, 255), 28, 28)).permute(2, 0, 1)
    )


@pytest.mark.parametrize("along", [0, 1])
def test_centre_view_resizes_only_a_strip_s_middle(along):
    """The full strip would have 256 x 15 million pixels."""
    strip = np.moveaxis(photo(0, 60_000, 4)[:, :1], 0, along)
    middle = np.moveaxis(np.moveaxis(strip, along, 0)[29_998:30_002], 0, along)
    assert torch.equal(CentreView(32)(strip), CentreView(32)(middle))


# The network's input.


def test_normalize_equals_torchvision():
    images = [noise(seed, 7, 9) for seed in range(3)]
    images[0][:4, :4] = (0, 255, 0)
    torchvisions = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    expected = torch.stack([torchvisions(Image.fromarray(image)) for image in images])
    actual = normalize(
        torch.stack([functional.pil_to_tensor(Image.fromarray(image)) for image in images])
    )
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_normalize_follows_its_formula_for_all_bytes():
    actual = normalize(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16))
    for channel in range(3):
        expected = [(byte / 255 - MEAN[channel]) / STD[channel] for byte in range(256)]
        torch.testing.assert_close(
            actual[0, channel].flatten(), torch.tensor(expected), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_returns_channels_last(memory_format):
    images = torch.from_numpy(np.stack([noise(seed, 5, 6) for seed in range(2)])).permute(
        0, 3, 1, 2
    )
    actual = normalize(images.contiguous(memory_format=memory_format))
    assert actual.shape == (2, 3, 5, 6)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, normalize(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_returns_floats_unchanged(dtype):
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = images.clone()
    actual = normalize(images)
    assert actual.dtype == dtype
    assert torch.equal(actual, before)


def test_normalize_does_not_change_its_input():
    images = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    normalize(images)
    assert torch.equal(images, torch.full((1, 3, 2, 2), 7, dtype=torch.uint8))


def test_normalize_makes_its_constants_once(monkeypatch):
    images = torch.zeros(1, 3, 2, 6, dtype=torch.uint8)
    first = normalize(images)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("new constants"))
    assert torch.equal(normalize(images), first)
