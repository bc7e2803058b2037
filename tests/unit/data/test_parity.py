"""The distribution of views compared with torchvision's on PIL images.

Every comparison has a limit from the sampling error at its number of draws. For complete views, the
views of both sides are divided into two random halves, 300 times. The distance between the sides
may be 1.3 times the largest distance between such halves. For changes of one picture and for crops,
it is the test of Kolmogorov and Smirnov at the level of a thousandth. Tests show that each kind of
comparison rejects wrong pipelines.
"""

import functools

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import functional

import job.data.augment
from job.data import render, render_batch
from job.data.augment import ClassifierView, RandomView, random_crop
from pictures import photo, plain, vivid

pytestmark = pytest.mark.slow

SIZE = 32  # pixels of a view
PAIRS = 200  # pairs of views of every picture
DEALS = 300  # divisions into random halves
PICTURES = [photo(seed, 90, 120) for seed in range(4)] + [
    vivid(8, 90, 120, spread=0.04),
    vivid(9, 100, 70, spread=0.1),
]


class Blur:
    """PIL's Gaussian blur by a radius drawn between 0.1 and `largest`."""

    def __init__(self, largest):
        self.largest = largest

    def __call__(self, image):
        return image.filter(
            ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, self.largest).item())
        )


class InTurn(transforms.ColorJitter):
    """A jitter whose four operations always have the same order."""

    def forward(self, image):
        _, *factors = self.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        for adjust, factor in zip(
            (
                functional.adjust_brightness,
                functional.adjust_contrast,
                functional.adjust_saturation,
                functional.adjust_hue,
            ),
            factors,
            strict=True,
        ):
            image = adjust(image, factor)
        return image


V2 = {
    "crop": 0.2,
    "resize": transforms.InterpolationMode.BILINEAR,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jittered": 0.8,
    "jitterer": transforms.ColorJitter,
    "grey": 0.2,
    "grey_first": False,
    "blurred": 0.5,
    "blur": 2.0,
    "flipped": 0.5,
}
V1 = V2 | {"jitter": (0.4, 0.4, 0.4, 0.4), "jittered": 1.0, "grey_first": True, "blurred": 0.0}
CLASSIFIER = V2 | {"crop": 0.08, "jittered": 0.0, "grey": 0.0, "blurred": 0.0}


def changes(setting):
    """Return torchvision's changes of a crop, a PIL image."""
    colour = transforms.RandomApply(
        [setting["jitterer"](*setting["jitter"])], p=setting["jittered"]
    )
    grey = transforms.RandomGrayscale(p=setting["grey"])
    blur = transforms.RandomApply([Blur(setting["blur"])], p=setting["blurred"])
    flip = transforms.RandomHorizontalFlip(setting["flipped"])
    return [*([grey, colour] if setting["grey_first"] else [colour, grey]), blur, flip]


def torchvisions(setting, seed=1):
    """Return torchvision's pairs of views, (pictures, PAIRS, 2, SIZE, SIZE, 3) uint8."""
    crop = transforms.RandomResizedCrop(
        SIZE, scale=(setting["crop"], 1.0), interpolation=setting["resize"]
    )
    view = transforms.Compose([crop, *changes(setting)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        images = [Image.fromarray(picture) for picture in PICTURES]
        views = [[np.asarray(view(image)) for _ in range(2 * PAIRS)] for image in images]
    return np.stack(views).reshape(len(PICTURES), PAIRS, 2, SIZE, SIZE, 3)


def ours(view, seed=0, in_batches=False):
    """Return our pairs of views, of the same shape, rendered one by one or in batches."""
    random = np.random.default_rng(seed)

    def draw(picture):
        if not in_batches:
            return torch.stack([view(picture, random) for _ in range(2 * PAIRS)])
        drawn = [
            (view.crop(picture, random), torch.from_numpy(view.appearance(random)))
            for _ in range(2 * PAIRS)
        ]
        return render_batch.render(*(torch.stack(each) for each in zip(*drawn, strict=True)))

    views = torch.stack([draw(picture) for picture in PICTURES]).permute(0, 1, 3, 4, 2).numpy()
    return views.reshape(len(PICTURES), PAIRS, 2, SIZE, SIZE, 3)


def measure(views):
    """Return measures of views, {name: (pictures, PAIRS, K)}: numbers or histograms."""
    flat = np.ascontiguousarray(views).reshape(-1, SIZE, SIZE, 3)
    hsv = np.stack([cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL) for view in flat])
    luma = flat @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (N, SIZE, SIZE)
    level = luma.mean((1, 2))
    across, down = (np.log(1 + np.square(np.diff(luma, axis=axis)).mean((1, 2))) for axis in (2, 1))

    def histogram(values, low, high, bins=12, weights=None):
        """Return fractions of `bins` bins, (N, bins), of values (N, ...)."""
        values = values.reshape(len(flat), -1)
        bin_of = ((values - low) / (high - low) * bins).clip(0, bins - 1).astype(int)
        bin_of += bins * np.arange(len(flat))[:, None]
        weights = np.ones_like(values) if weights is None else weights.reshape(values.shape)
        counts = np.bincount(bin_of.ravel(), weights.ravel(), bins * len(flat)).reshape(
            len(flat), bins
        )
        return counts / values.shape[1]

    shown = {
        "channel means": flat.mean((1, 2)) / 255,
        "channel deviations": flat.std((1, 2)) / 255,
        "red levels": histogram(flat[..., 0], 0, 256),
        "green levels": histogram(flat[..., 1], 0, 256),
        "blue levels": histogram(flat[..., 2], 0, 256),
        "brightness": histogram(level, 0, 256),
        "contrast": histogram(luma.std((1, 2)), 0, 80),
        "gradients across": histogram(across, 0, 8),
        "gradients down": histogram(down, 0, 8),
        "grey": (hsv[..., 1].max((1, 2)) == 0)[:, None],
        "saturation": histogram(hsv[..., 1].mean((1, 2)), 0, 256),
        "hue": histogram(hsv[..., 0].astype(float), 0, 256, 32, hsv[..., 1] / 255),
        "left and right": histogram(
            luma[:, :, SIZE // 2 :].mean((1, 2)) - luma[:, :, : SIZE // 2].mean((1, 2)), -60, 60
        ),
    }
    unlike = luma - level[:, None, None]
    unlike /= np.sqrt(np.square(unlike).sum((1, 2), keepdims=True)) + 1e-3
    shown["pairs"] = histogram((unlike[::2] * unlike[1::2]).sum((1, 2)).repeat(2), -1, 1)
    return {
        name: value.reshape(len(PICTURES), PAIRS, 2, -1).mean(2) for name, value in shown.items()
    }


def distances(one, other):
    """Return {name: (distance between two sides' measures, its limit)}.

    For a picture it is half the sum of the differences between the sides' means (for a histogram,
    the total variation). Distances of all pictures are added. Halves are drawn by pairs of a
    picture.
    """
    deal = np.random.default_rng(2)
    signs = np.stack([deal.permutation(np.repeat([1.0, -1.0], PAIRS)) for _ in range(DEALS)])
    # The first row divides the pairs by their sides.
    signs = np.concatenate([np.repeat([[1.0, -1.0]], PAIRS, axis=1), signs]) / PAIRS
    distance_of = {}
    for name in one:
        both = np.concatenate([one[name], other[name]], axis=1)  # (pictures, 2 PAIRS, K)
        totals = np.abs(np.einsum("dn,pnk->dpk", signs, both, optimize=True)).sum((1, 2)) / 2
        distance_of[name] = (totals[0], 1.3 * totals[1:].max())
    return distance_of


def rejected(one, other):
    """Return the names of the measures by which two sides differ."""
    return {name for name, (distance, limit) in distances(one, other).items() if distance > limit}


VIEWS = {
    "v2": (RandomView(SIZE, True), V2),
    "v1": (RandomView(SIZE, False), V1),
    "classifier": (ClassifierView(SIZE), CLASSIFIER),
}


@functools.cache
def measured(version, in_batches):
    """Return the measures of our views."""
    return measure(ours(VIEWS[version][0], in_batches=in_batches))


@functools.cache
def torchvision_measured(version):
    """Return the measures of torchvision's views."""
    return measure(torchvisions(VIEWS[version][1]))


def wrong_ones(cases):
    """Run a test with each of `cases`: version, wrong setting, the measures that must detect it."""
    names = [f"{version}-{'-'.join(wrong)}" for version, wrong, _ in cases]
    return pytest.mark.parametrize(("version", "wrong", "seen"), cases, ids=names)


@pytest.mark.parametrize(
    ("version", "in_batches"),
    [("v2", False), ("v2", True), ("v1", False), ("v1", True), ("classifier", False)],
)
@pytest.mark.short
def test_views_match_torchvision(version, in_batches):
    assert rejected(measured(version, in_batches), torchvision_measured(version)) == set()


WRONG = [
    ("v2", {"blurred": 0.0}, {"gradients across", "gradients down"}),
    ("v2", {"jitter": (0.4, 0.4, 0.4, 0.2)}, {"hue"}),
    (
        "v2",
        {"jittered": 0.4},
        {"red levels", "green levels", "brightness", "contrast", "saturation", "hue"},
    ),
    ("v2", {"grey": 0.3}, {"grey"}),
    ("v2", {"flipped": 0.0}, {"left and right", "pairs"}),
    ("v1", {"jitter": (0.4, 0.4, 0.4, 0.2)}, {"channel means", "blue levels", "hue"}),
    ("classifier", {"crop": 0.3}, {"channel deviations", "contrast"}),
]


@wrong_ones(WRONG)
def test_views_differ_from_a_wrong_pipeline(version, wrong, seen):
    theirs = measure(torchvisions(VIEWS[version][1] | wrong))
    for in_batches in (False, True) if version != "classifier" else (False,):
        assert seen <= rejected(measured(version, in_batches), theirs)


def test_views_measures_each_detect_an_error():
    assert set.union(*(seen for _, _, seen in WRONG)) == set(measured("v2", False))


# One picture without crops shows only the distribution of its changes, and many draws are cheap.
# A plain picture shows only colours. It must not be smaller than the blurs reach.

SIDE = render_batch.RADIUS + 1
SMALL = {
    "orange": plain((235, 150, 60), SIDE, SIDE),
    "blue": plain((70, 110, 190), SIDE, SIDE),
    "photo": photo(4, 24, 24),
}
DRAWS = {"orange": 8000, "blue": 8000, "photo": 4000}


def by_torchvision(picture, setting):
    """Return torchvision's changes of one of SMALL, (DRAWS, H, W, 3) uint8."""
    change, image = transforms.Compose(changes(setting)), Image.fromarray(SMALL[picture])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return np.stack([np.asarray(change(image)) for _ in range(DRAWS[picture])])


@functools.cache
def by_us(picture, version, in_batches):
    """Return this project's changes of one of SMALL, of the same shape."""
    random = np.random.default_rng(0)
    drawn = np.stack([VIEWS[version][0].appearance(random) for _ in range(DRAWS[picture])])
    if not in_batches:
        return np.stack([render.render(SMALL[picture], row) for row in drawn])
    batch = torch.from_numpy(SMALL[picture]).permute(2, 0, 1).expand(len(drawn), -1, -1, -1)
    return render_batch.render(batch, torch.from_numpy(drawn)).permute(0, 2, 3, 1).numpy()


def differ(one, other, tolerance=0.0):
    """Return whether Kolmogorov and Smirnov's test rejects two samples at the level 0.001."""
    limit = np.sqrt(-np.log(0.001 / 2) / 2 * (1 / len(one) + 1 / len(other)))
    return ks_2samp(one, other, method="asymp").statistic > limit + tolerance


def colours_unlike(ours, theirs):
    """Return the measures in which two sets of plain pictures (DRAWS, SIDE, SIDE, 3) differ.

    PIL rounds down. So all values are spread by four levels, and hues by 4 of 255: the side of a
    value on which unchanged colours are then does not matter. The rest may differ by a hundredth.
    """

    def shown(colours, seed):
        hue = cv2.cvtColor(colours[:, 0].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[:, 0, 0] / 360
        colours = colours[:, 0, 0].astype(int)
        luma = colours @ np.array([0.299, 0.587, 0.114])
        levels = np.stack([255 * ((hue + 0.5) % 1), luma, colours.max(1), np.ptp(colours, axis=1)])
        return levels + np.random.default_rng(seed).uniform(-4, 4, levels.shape)

    names = ["hue", "luma", "strongest channel", "chroma"]
    return {
        name
        for name, *two in zip(names, shown(ours, 3), shown(theirs, 4), strict=True)
        if differ(*two, tolerance=0.01)
    }


@pytest.mark.parametrize("colour", ["orange", "blue"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_colours_match_torchvision(version, colour):
    theirs = by_torchvision(colour, VIEWS[version][1])
    for in_batches in (False, True):
        assert colours_unlike(by_us(colour, version, in_batches), theirs) == set()


@wrong_ones(
    [
        ("v1", {"jitterer": InTurn}, {"strongest channel"}),
        ("v2", {"jitterer": InTurn}, {"strongest channel"}),
        ("v2", {"jitter": (0.5, 0.4, 0.4, 0.1)}, {"strongest channel"}),
        ("v2", {"jitter": (0.4, 0.4, 0.7, 0.1)}, {"chroma"}),
        ("v2", {"jitter": (0.4, 0.4, 0.4, 0.15)}, {"hue"}),
        ("v2", {"jittered": 0.7}, {"luma", "chroma", "hue"}),
        ("v2", {"grey": 0.25}, {"chroma"}),
    ]
)
def test_colours_differ_from_a_wrong_pipeline(version, wrong, seen):
    theirs = by_torchvision("orange", VIEWS[version][1] | wrong)
    for in_batches in (False, True):
        assert seen <= colours_unlike(by_us("orange", version, in_batches), theirs)


def pictures_unlike(ours, theirs):
    """Return the measures in which two sets of one picture's views (DRAWS, H, W, 3) differ.

    Sharpness is the mean squared step from pixel to pixel over the variance, which colours hardly
    change. Values are spread as above. Two hundredths more than the sampling error are allowed,
    because PIL blurs by boxes, and more strongly below half a pixel.
    """

    def shown(views, seed):
        luma, spread = (
            views @ np.array([0.299, 0.587, 0.114], dtype=np.float32),
            np.random.default_rng(seed).uniform,
        )
        steps = np.square(np.diff(luma, axis=2)).mean((1, 2))
        halves = luma[:, :, 12:].mean((1, 2)) > luma[:, :, :12].mean((1, 2))
        return {
            "brightness": luma.mean((1, 2)) + spread(-2, 2, len(views)),
            "contrast": luma.std((1, 2)) * (1 + spread(-0.05, 0.05, len(views))),
            "sharpness": steps / luma.var((1, 2)) * (1 + spread(-0.05, 0.05, len(views))),
            "side": halves,
        }

    one, other = shown(ours, 3), shown(theirs, 4)
    return {name for name in one if differ(one[name], other[name], tolerance=0.02)}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.short
def test_picture_matches_torchvision(version):
    theirs = by_torchvision("photo", VIEWS[version][1])
    for in_batches in (False, True):
        assert pictures_unlike(by_us("photo", version, in_batches), theirs) == set()


@wrong_ones(
    [
        ("v2", {"blurred": 0.3}, {"sharpness"}),
        ("v2", {"blur": 1.5}, {"sharpness"}),
        ("v2", {"blur": 3.0}, {"sharpness"}),
        ("v2", {"flipped": 0.4}, {"side"}),
        ("v2", {"jitter": (0.5, 0.4, 0.4, 0.1)}, {"brightness"}),
        ("v2", {"jitter": (0.4, 0.6, 0.4, 0.1)}, {"contrast"}),
    ]
)
def test_picture_differs_from_a_wrong_pipeline(version, wrong, seen):
    theirs = by_torchvision("photo", VIEWS[version][1] | wrong)
    for in_batches in (False, True):
        assert seen <= pictures_unlike(by_us("photo", version, in_batches), theirs)


# Positions and sizes of crops.

CROPS = 4000


def crops_of(height, width, scale, monkeypatch):
    """Return crops of an image by `random_crop`, (CROPS, 4): top, left, height, width."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(height)[:, None], np.arange(width)
    monkeypatch.setattr(
        job.data.augment, "resize", lambda crop, *size: (*crop[0, 0, :2].tolist(), *crop.shape[:2])
    )
    random = np.random.default_rng(0)
    return np.array([random_crop(image, 8, scale, random) for _ in range(CROPS)])


def torchvision_crops(height, width, scale, ratio=(3 / 4, 4 / 3)):
    image = Image.new("L", (width, height))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return np.array(
            [transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(CROPS)]
        )


def placed_unlike(ours, theirs):
    """Return the measures in which crops (CROPS, 4) differ."""

    def shown(crops):
        tops, lefts, heights, widths = crops.T
        return {
            "area": heights * widths,
            "proportions": widths / heights,
            "top": tops,
            "left": lefts,
            "middle across": lefts + widths / 2,
            "middle down": tops + heights / 2,
        }

    one, other = shown(ours), shown(theirs)
    return {name for name in one if differ(one[name], other[name])}


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 120), (200, 60), (40, 250), (5, 4)])
@pytest.mark.parametrize("least", [0.08, 0.2])
def test_crops_match_torchvision(height, width, least, monkeypatch):
    ours = crops_of(height, width, (least, 1.0), monkeypatch)
    assert placed_unlike(ours, torchvision_crops(height, width, (least, 1.0))) == set()


@pytest.mark.parametrize(
    ("scale", "ratio", "seen"),
    [
        ((0.25, 1.0), (3 / 4, 4 / 3), "area"),
        ((0.2, 0.8), (3 / 4, 4 / 3), "area"),
        ((0.2, 1.0), (2 / 3, 3 / 2), "proportions"),
        ((0.2, 1.0), (3 / 4, 1.2), "proportions"),
    ],
)
def test_crops_differ_from_wrong_ones(scale, ratio, seen, monkeypatch):
    theirs = torchvision_crops(90, 120, scale, ratio)
    assert seen in placed_unlike(crops_of(90, 120, (0.2, 1.0), monkeypatch), theirs)


def test_crops_differ_at_wrong_positions(monkeypatch):
    """Each crop is moved by a tenth of its distance towards the top left corner."""
    ours, theirs = (
        crops_of(90, 120, (0.2, 1.0), monkeypatch),
        torchvision_crops(90, 120, (0.2, 1.0)),
    )
    theirs[:, :2] = 0.9 * theirs[:, :2]
    assert {"top", "left"} <= placed_unlike(ours, theirs)
