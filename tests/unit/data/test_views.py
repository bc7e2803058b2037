"""Datasets of views, and their batches."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from job.data import images as images_module
from job.data import views as views_module
from job.data.folders import scan
from job.data.loader import Batches
from job.data.views import CentreViews, NumberedCrops, NumberedViews, OneView, RandomViews, collate
from job.data.augment import CentreView, ClassifierView, RandomView
from job.data.randomness import counter
from job.data.render import render
from batches import SIZE, same, write_numbered
from pictures import photo


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve images in two classes."""
    return write_numbered(tmp_path_factory.mktemp("images"))


def drawn_later(crop, appearance):
    """Return a view (3, H, W) of its crop and appearance."""
    return torch.from_numpy(
        render(crop.permute(1, 2, 0).numpy(), appearance.numpy()).copy()
    ).permute(2, 0, 1)


MAKES = {
    "two views, v1": lambda images, seed: RandomViews(images, RandomView(SIZE, False), 2, seed),
    "two views, v2": lambda images, seed: RandomViews(images, RandomView(SIZE, True), 2, seed),
    "two crops": lambda images, seed: RandomViews(images, RandomView(SIZE, True), 2, seed, False),
    "a view of its own": lambda images, seed: RandomViews(images, RandomView(SIZE, True), 1, seed),
    "one view": lambda images, seed: OneView(images, ClassifierView(SIZE), seed),
}
all_kinds = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
both_versions = pytest.mark.parametrize("aug_plus", [False, True])


@both_versions
def test_views_are_uint8_of_the_size(images, aug_plus):
    query, key, bad = RandomViews(images, RandomView(SIZE, aug_plus), 2, seed=0)[0, 3]
    for view in (query, key):
        assert view.shape == (3, SIZE, SIZE)
        assert view.dtype == torch.uint8
    assert bad == []


@both_versions
def test_views_rendered_later_are_equal(images, aug_plus):
    view = RandomView(SIZE, aug_plus)
    at_once, later = (RandomViews(images, view, 2, 4, rendered) for rendered in (True, False))
    for draw in [(epoch, index) for epoch in (0, 7) for index in range(12)]:
        query, key, bad = later[draw]
        assert (query[1].shape, query[1].dtype) == ((12,), torch.float32)
        assert same(at_once[draw], (drawn_later(*query), drawn_later(*key), bad))


@pytest.mark.parametrize("rendered", [False, True])
def test_views_first_is_independent_of_their_number(images, rendered):
    view = RandomView(SIZE, True)
    one, two, three = (RandomViews(images, view, number, 0, rendered) for number in (1, 2, 3))
    for draw in [(epoch, index) for epoch in (0, 7) for index in range(12)]:
        assert (len(one[draw]), len(two[draw]), len(three[draw])) == (2, 3, 4)
        assert same(one[draw][:1], three[draw][:1]) and same(two[draw][:2], three[draw][:2])
    first, both = (collate([views[0, index] for index in range(4)]) for views in (one, two))
    assert (len(first), len(both)) == (2, 3) and same(first[0], both[0])


@all_kinds
def test_views_depend_on_seed_epoch_and_index(images, make):
    views = make(images, 5)
    expected = [views[1, index] for index in range(12)]
    torch.manual_seed(77)
    again = make(images, 5)
    for index in reversed(range(12)):
        torch.rand(index)
        np.random.rand(index)
        assert same(again[1, index], expected[index])


@all_kinds
def test_views_differ_elsewhere(images, make):
    views, other = make(images, 0), make(images, 1)
    firsts = [item[0] for item in (views[0, 0], views[1, 0], views[2, 0], other[0, 0], views[0, 1])]
    for number, view in enumerate(firsts):
        assert not any(same(view, later) for later in firsts[number + 1 :])


@both_versions
@pytest.mark.parametrize("rendered", [False, True])
def test_views_of_an_image_differ(images, aug_plus, rendered):
    views = RandomViews(images, RandomView(SIZE, aug_plus), 2, 0, rendered)
    assert not any(same(*views[0, index][:2]) for index in range(12))


@all_kinds
def test_views_do_not_change_global_generators(images, make):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    make(images, 0)[0, 0]
    assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())


def test_one_view_has_the_image_s_label(images):
    one, centre = OneView(images, ClassifierView(SIZE), 0), CentreViews(images, SIZE)
    for index in range(12):
        assert one[0, index][1:] == (int(images.labels[index]), [])
        assert same(
            centre[index], (CentreView(SIZE)(images.read(index)[0]), int(images.labels[index]), [])
        )


def test_one_view_can_be_the_centre(images):
    """A classifier can be trained without random views."""
    views = OneView(images, CentreView(SIZE), 0)
    assert same(views[0, 3], views[5, 3])
    assert same(views[0, 3], CentreViews(images, SIZE)[3])


# Large JPEGs, which are decoded at a fraction of their sides.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of six JPEGs of 480 x 360, and the same pixels as PNGs."""
    root = tmp_path_factory.mktemp("large")
    for form in ("jpg", "png"):
        folder = root / form / "train" / "a"
        folder.mkdir(parents=True)
        for seed in range(6):
            path = root / "jpg" / "train" / "a" / f"{seed}.jpg"
            image = Image.open(path) if form == "png" else Image.fromarray(photo(seed, 360, 480))
            image.save(folder / f"{seed}.{form}")
    return [scan(str(root / form), "train") for form in ("jpg", "png")]


@pytest.mark.parametrize("rendered", [False, True])
def test_views_of_large_jpegs_have_the_same_draws(large, rendered, monkeypatch):
    """PNGs, which are not reduced, show nearly the same views of the same pixels."""
    shapes, cutting = [], views_module.cut
    monkeypatch.setattr(
        views_module,
        "cut",
        lambda image, *more: (shapes.append(image.shape), cutting(image, *more))[1],
    )
    jpegs, pngs = (RandomViews(each, RandomView(SIZE, True), 2, 0, rendered) for each in large)
    for index in range(6):
        reduced, full = jpegs[3, index], pngs[3, index]
        for one, other in zip(reduced[:2], full[:2], strict=True):
            if not rendered:
                assert torch.equal(one[1], other[1])
                one, other = one[0], other[0]
            assert (one.float() - other.float()).abs().mean() < 8
    assert {shape[0] for shape in shapes} > {360} and min(shapes) < (360,)


def test_views_of_large_jpegs_are_functions_of_their_draws(large):
    images, _ = large
    views = RandomViews(images, RandomView(SIZE, True), 2, 5)
    expected = [views[1, index] for index in range(6)]
    again = RandomViews(images, RandomView(SIZE, True), 2, 5)
    assert all(same(again[1, index], expected[index]) for index in reversed(range(6)))
    draws = [[(1, 0), (1, 1), (1, 2)], [(1, 3), (1, 4), (1, 5)]]
    both = list(Batches(again, draws, 2))
    for number, (query, key, _) in enumerate(both):
        for place in range(3):
            item = expected[3 * number + place]
            assert torch.equal(query[place], item[0]) and torch.equal(key[place], item[1])


def test_views_of_a_large_jpeg_share_one_decode(large, monkeypatch):
    images, _ = large
    decoded, decode = [], images_module.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        images_module.simplejpeg,
        "decode_jpeg",
        lambda *arguments, **named: (decoded.append(named), decode(*arguments, **named))[1],
    )
    RandomViews(images, RandomView(SIZE, True), 2, 0)[0, 0]
    assert len(decoded) == 1


def test_views_of_a_replaced_image_are_of_its_size(tmp_path):
    """The draws of the image in its place."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(photo(0, 90, 120)).save(folder / "1.jpg")
    (folder / "0.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-100])
    views = RandomViews(scan(str(tmp_path), "train", max_bad=1), RandomView(SIZE, True), 2, 0)
    image = views.images.read(1)[0]
    random = np.random.Generator(counter(0, "view", epoch=2, sample=0))
    *actual, bad = views[2, 0]
    assert len(bad) == 1 and same(actual, [views.view(image, random) for _ in range(2)])


# Batches.


def filled(value):
    return torch.full((3, 2, 2), value, dtype=torch.uint8)


def test_collate_stacks_and_joins():
    items = [
        (filled(1), filled(2), ["a"]),
        (filled(5), filled(6), []),
        (filled(9), filled(10), ["b", "c"]),
    ]
    query, key, bad = collate(items)
    assert query[:, 0, 0, 0].tolist() == [1, 5, 9]
    assert key[:, 0, 0, 0].tolist() == [2, 6, 10]
    assert query.shape == key.shape == (3, 3, 2, 2)
    assert query.dtype == key.dtype == torch.uint8
    assert bad == ["a", "b", "c"]


def test_collate_returns_channels_last(images):
    views = [RandomViews(images, RandomView(SIZE, True), 2, 0)[0, index][0] for index in range(4)]
    for given in (views, [view.contiguous() for view in views]):
        batch, _, _ = collate([(view, 0, []) for view in given])
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(*pair) for pair in zip(batch, views, strict=True))


def test_collate_keeps_appearances_with_crops():
    pairs = [
        (
            (filled(n), torch.full((12,), n + 0.5)),
            (filled(n + 1), torch.full((12,), n + 1.5)),
            [str(n)],
        )
        for n in (3, 7)
    ]
    (crops, appearances), (other_crops, other_appearances), bad = collate(pairs)
    assert crops[:, 0, 0, 0].tolist() == [3, 7] and other_crops[:, 2, 1, 1].tolist() == [4, 8]
    assert appearances.tolist() == [[3.5] * 12, [7.5] * 12] and other_appearances[
        :, 11
    ].tolist() == [4.5, 8.5]
    assert crops.shape == other_crops.shape == (2, 3, 2, 2)
    assert bad == ["3", "7"]


def test_collate_makes_labels_int64():
    _, labels, bad = collate([(filled(0), 4, []), (filled(0), 7, [])])
    assert labels.tolist() == [4, 7]
    assert labels.dtype == torch.int64
    assert bad == []


def test_views_name_a_replaced_image(tmp_path):
    """In training it has the other's label, in measuring none, as the other is measured too."""
    for letter, number in (("a", 0), ("b", 1)):
        (tmp_path / "train" / letter).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "train" / letter / f"{number}.png")
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"x")
    folder = scan(str(tmp_path), "train", max_bad=1)
    draws = [[(0, 0), (0, 1)]]
    [(_, _, training)] = Batches(RandomViews(folder, RandomView(SIZE, False), 2, 0), draws, 0)
    [(_, labels, classifying)] = Batches(OneView(folder, ClassifierView(SIZE), 0), draws, 0)
    [(views, measured, measuring)] = Batches(CentreViews(folder, SIZE), [[0, 1]], 0)
    assert training == classifying == measuring
    assert len(training) == 1
    assert os.path.join("train", "a", "0.png") in training[0]
    assert labels.tolist() == [1, 1]
    assert measured.tolist() == [-1, 1]
    assert torch.equal(*views)


@pytest.mark.parametrize(("max_bad", "read"), [(1, 1), (0, -1)])
def test_numbered_items_have_the_index_of_the_image_read(tmp_path, max_bad, read):
    """The next image replaces the undecodable one, or a black one, which has no index."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"x")
    for name in ("1.png", "2.png"):
        Image.new("RGB", (20, 20), "red").save(folder / name)
    images, draws = scan(str(tmp_path), "train", max_bad=max_bad), [0, 1, 2, 0]
    view = RandomView(SIZE, False)
    for rendered in (True, False):
        numbered = NumberedViews(images, view, 2, 0, rendered)
        plain = RandomViews(images, view, 2, 0, rendered)
        [batch] = Batches(numbered, [[(4, index) for index in draws]], 1)
        [expected] = Batches(plain, [[(4, index) for index in draws]], 0)
        assert batch[2].tolist() == [read, 1, 2, read] and batch[2].dtype == torch.int64
        assert same([*batch[:2], batch[3]], expected)
    [(crops, indices, bad)] = Batches(NumberedCrops(images, SIZE), [draws], 1)
    assert indices.tolist() == [read, 1, 2, read] and len(bad) == 2
    assert same(crops, next(Batches(CentreViews(images, SIZE), [draws], 0))[0])
