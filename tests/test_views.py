import os

import numpy as np
import pytest
import torch
from PIL import Image

from job.data.folders import TrainingOrder, every_nth_batch, scan
from job.data.views import CentreViews, TwoViews, collate, loader
from moco.augment import centre_view, random_view

SIZE = 16


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve images in two classes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = root / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return scan(str(root), "train", max_bad=3)


def same(first, second):
    """Whether two items have the same bytes."""
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(first, second, strict=True))


both_versions = pytest.mark.parametrize("aug_plus", [False, True])


@both_versions
def test_views_are_bytes_of_the_size_asked_for(images, aug_plus):
    query, key, bad = TwoViews(images, random_view(SIZE, aug_plus), seed=0)[0, 3]
    for view in (query, key):
        assert view.shape == (3, SIZE, SIZE)
        assert view.dtype == torch.uint8
    assert bad == []


@both_versions
def test_views_are_a_function_of_seed_epoch_and_index(images, aug_plus):
    views = TwoViews(images, random_view(SIZE, aug_plus), seed=5)
    expected = [views[1, index] for index in range(12)]
    torch.manual_seed(77)
    again = TwoViews(images, random_view(SIZE, aug_plus), seed=5)
    for index in reversed(range(12)):
        torch.rand(index)
        assert same(again[1, index], expected[index])


@both_versions
def test_another_epoch_seed_or_image_gives_other_views(images, aug_plus):
    views, other = TwoViews(images, random_view(SIZE, aug_plus), seed=0), TwoViews(images, random_view(SIZE, aug_plus), seed=1)
    drawn = [view for item in (views[0, 0], views[1, 0], views[2, 0], other[0, 0], views[0, 1]) for view in item[:2]]
    for place, view in enumerate(drawn):
        assert not any(torch.equal(view, later) for later in drawn[place + 1 :])


def test_the_two_views_of_an_image_differ(images):
    views = TwoViews(images, random_view(SIZE, True), seed=0)
    assert not any(torch.equal(*views[0, index][:2]) for index in range(12))


def test_drawing_views_leaves_torch_s_own_generator_alone(images):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TwoViews(images, random_view(SIZE, True), seed=0)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_centre_view_is_that_of_the_image_with_its_label(images):
    views = CentreViews(images, SIZE)
    for index in range(12):
        view, label, bad = views[index]
        assert torch.equal(view, centre_view(SIZE)(images.read(index)[0]))
        assert (label, bad) == (int(images.labels[index]), [])


def test_a_batch_stacks_views_and_joins_the_undecodable():
    def item(value, bad):
        return torch.full((3, 2, 2), value, dtype=torch.uint8), torch.full((3, 2, 2), value + 1, dtype=torch.uint8), bad

    query, key, bad = collate([item(1, ["a"]), item(5, []), item(9, ["b", "c"])])
    assert query[:, 0, 0, 0].tolist() == [1, 5, 9]
    assert key[:, 0, 0, 0].tolist() == [2, 6, 10]
    assert query.shape == key.shape == (3, 3, 2, 2)
    assert query.dtype == key.dtype == torch.uint8
    assert bad == ["a", "b", "c"]


def test_a_batch_of_labels_is_a_tensor_of_whole_numbers():
    view = torch.zeros(3, 2, 2, dtype=torch.uint8)
    _, labels, bad = collate([(view, 4, []), (view, 7, [])])
    assert labels.tolist() == [4, 7]
    assert labels.dtype == torch.int64
    assert bad == []


def test_an_undecodable_image_is_named_with_the_views_of_another(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"x")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "train" / "a" / "1.png")
    folder = scan(str(tmp_path), "train", max_bad=1)
    [(_, _, training)] = loader(TwoViews(folder, random_view(SIZE, False), 0), [[(0, 0), (0, 1)]], 0, False)
    [(_, _, measuring)] = loader(CentreViews(folder, SIZE), [[0, 1]], 0, False)
    assert training == measuring
    assert len(training) == 1
    assert os.path.join("train", "a", "0.png") in training[0]


def test_a_loader_s_processes_change_no_byte(images):
    """Two processes share the batches of two epochs; a third loader measures. Started once: they are slow to start."""
    order = TrainingOrder(images=12, total=8, rank=1, size=2, seed=0, epochs=3, start=(1, 0))
    views = TwoViews(images, random_view(SIZE, True), seed=0)
    alone, shared = list(loader(views, order, 0, False)), list(loader(views, order, 2, False))
    assert len(alone) == len(order) == 2
    for draws, expected, found in zip(order, alone, shared, strict=True):
        assert same(expected, found)
        assert same(expected, collate([views[draw] for draw in draws]))

    batches = every_nth_batch(list(range(12)), 5, 0, 1)
    measured = list(loader(CentreViews(images, SIZE), batches, 2, False))
    assert [len(labels) for _, labels, _ in measured] == [5, 5, 2]
    assert torch.cat([labels for _, labels, _ in measured]).tolist() == images.labels.tolist()


def test_a_loader_draws_nothing_from_torch_s_own_generator_that_views_depend_on(images):
    order = TrainingOrder(images=12, total=4, rank=0, size=1, seed=0, epochs=1)
    views = TwoViews(images, random_view(SIZE, False), seed=0)
    torch.manual_seed(1)
    first = list(loader(views, order, 0, False))
    torch.manual_seed(2)
    assert all(same(a, b) for a, b in zip(first, loader(views, order, 0, False), strict=True))
