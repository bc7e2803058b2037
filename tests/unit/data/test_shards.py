"""Packed images, their index, and their order in lanes."""

import os
import pickle
import shutil
import time

import numpy as np
import pytest
import torch

import job.files
from job.data import shards
from job.data.folders import TrainingOrder, every_nth_batch, scan
from job.data.shards import PackedImages, load_index, save_index
from job.data.tars import read_shard, write_shard
from job.data.loader import Batches
from job.data.views import CentreViews, RandomViews
from job.errors import RunError
from job.data.augment import RandomView


def packed(root, sizes, classes=("a", "b")):
    """Write shards of so many images, each of different bytes, and an index."""
    os.makedirs(root)
    names, first = [f"s-{number}.tar" for number in range(len(sizes))], 0
    for name, size in zip(names, sizes, strict=True):
        images = [
            (n, f"{classes[n % 2]}/{n}.png", n % 2, f"image {n}".encode() * (n % 5))
            for n in range(first, first + size)
        ]
        write_shard(os.path.join(root, name), images)
        first += size
    save_index(root, list(classes), [read_shard(os.path.join(root, name)) for name in names])
    return str(root)


def refused(root):
    with pytest.raises(RunError) as caught:
        load_index(str(root))
    assert "\n" not in str(caught.value)
    assert f"python -m job.pack --index {os.path.dirname(root)}" in str(caught.value)
    return str(caught.value)


def test_packed_images_have_their_content(tmp_path):
    """One shard has no images, one has a first image without bytes."""
    images = PackedImages(packed(tmp_path / "train", [3, 0, 1, 6]), max_bad=4)
    assert (len(images), images.classes, images.max_bad) == (10, ["a", "b"], 4)
    for n in range(10):
        assert images.content(n) == f"image {n}".encode() * (n % 5)
        assert images.labels[n] == n % 2
        assert (
            images.path(n)
            == f"{tmp_path}/train/s-{0 if n < 3 else 2 if n < 4 else 3}.tar:{'ab'[n % 2]}/{n}.png"
        )


def test_packed_images_open_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    images = PackedImages(packed(tmp_path / "train", [2] * 6), max_bad=0)
    before = len(os.listdir("/proc/self/fd"))
    for n in np.random.default_rng(0).integers(0, 12, 100).tolist():
        assert images.content(n) == f"image {n}".encode() * (n % 5)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_packed_images_copy_opens_its_own_files(tmp_path):
    images = PackedImages(packed(tmp_path / "train", [5]), max_bad=0)
    images.content(3)
    copy = pickle.loads(pickle.dumps(images))
    assert images.open_files and not copy.open_files
    assert copy.content(3) == images.content(3)


def test_shard_that_shrinks_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(job.files, "PAUSES", (0,))
    images = PackedImages(packed(tmp_path / "train", [5]), max_bad=4)
    os.truncate(tmp_path / "train" / "s-0.tar", 600)
    with pytest.raises(
        RunError, match="cannot read .*/s-0.tar:a/4.png: s-0.tar is incomplete, tried 2 times"
    ):
        images.read(4)


def test_index_unreadable_is_not_called_damaged(tmp_path, monkeypatch):
    """The read is also retried."""
    root = packed(tmp_path / "train", [5])
    os.rename(tmp_path / "train" / shards.INDEX, tmp_path / "index")
    monkeypatch.setattr(job.files, "PAUSES", (0, 600))
    with pytest.raises(
        RunError, match="cannot read .*index.npz: No such file or directory, tried 3 times"
    ):
        with monkeypatch.context() as context:
            context.setattr(time, "sleep", lambda pause: None)
            PackedImages(root, max_bad=0)
    monkeypatch.setattr(
        time,
        "sleep",
        lambda pause: pause and os.rename(tmp_path / "index", tmp_path / "train" / shards.INDEX),
    )
    assert len(PackedImages(root, max_bad=0)) == 5


def test_index_survives_saving(tmp_path):
    root = packed(tmp_path / "train", [2, 3], classes=("größe", "caf\udce9 x"))
    images = PackedImages(root, max_bad=0)
    assert images.classes == ["größe", "caf\udce9 x"]
    assert list(images.names)[:2] == ["größe/0.png", "caf\udce9 x/1.png"]


def test_index_names_a_missing_shard(tmp_path):
    packed(tmp_path / "train", [2, 2])
    os.remove(tmp_path / "train" / "s-1.tar")
    assert f"{tmp_path}/train/s-1.tar is missing" in refused(tmp_path / "train")


@pytest.mark.parametrize("change", [-512, 512])
def test_index_names_a_shard_of_another_size(tmp_path, change):
    packed(tmp_path / "train", [2, 2])
    size = os.path.getsize(tmp_path / "train" / "s-1.tar")
    os.truncate(tmp_path / "train" / "s-1.tar", size + change)
    assert f"s-1.tar has {size + change} bytes; expected {size}" in refused(tmp_path / "train")


def test_index_refuses_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT", 7)
    packed(tmp_path / "train", [2])
    monkeypatch.undo()
    assert "has format 7, this version reads 1" in refused(tmp_path / "train")


def test_index_refuses_other_content(tmp_path):
    packed(tmp_path / "train", [2])
    path = tmp_path / "train" / "index.npz"
    content = path.read_bytes()
    array = tmp_path / "array.npy"
    np.save(array, np.arange(5))
    np.savez(tmp_path / "other.npz", other=np.arange(5))
    with np.load(path) as file:
        np.savez(
            tmp_path / "less.npz", **{name: file[name] for name in file.files if name != "labels"}
        )
    damaged = [
        b"",
        b"x",
        bytes(1000),
        array.read_bytes(),
        *((tmp_path / f"{name}.npz").read_bytes() for name in ("other", "less")),
    ]
    for invalid in [*damaged, *(content[:cut] for cut in range(0, len(content), 97))]:
        path.write_bytes(invalid)
        assert "incomplete index" in refused(tmp_path / "train")


def test_index_damaged_is_refused_or_unchanged(tmp_path):
    packed(tmp_path / "train", [40])
    path = tmp_path / "train" / "index.npz"
    content, expected = path.read_bytes(), load_index(str(tmp_path / "train"))
    random, damages = np.random.default_rng(0), 0
    for offset in random.integers(0, len(content), 300).tolist():
        damaged = bytearray(content)
        damaged[offset] ^= 1 << random.integers(0, 8)
        path.write_bytes(damaged)
        try:
            actual = load_index(str(tmp_path / "train"))
        except RunError as error:
            assert "index.npz" in str(error)
            damages += 1
        else:
            assert actual.keys() == expected.keys() and all(
                np.array_equal(actual[name], expected[name]) for name in expected
            )
    assert damages > 100


# The order.


def shards_of(sizes):
    """Return images in shards of so many, without files."""
    images = object.__new__(PackedImages)
    images.shard_ends, images.labels = np.cumsum(sizes), np.zeros(sum(sizes), dtype=np.int64)
    return images


SIZES = {
    "equal": ([100] * 10, 32),
    "one": ([500], 16),
    "of one image": ([1] * 200, 8),
    "unequal": ([1, 700, 0, 3, 90, 1, 0, 0, 211], 20),
    "one step": ([30, 34], 64),
    "one short of two steps": ([30, 33], 32),
    "batches of one": ([10, 7, 4, 9, 12, 5], 1),
}
both = pytest.mark.parametrize(("sizes", "total"), SIZES.values(), ids=SIZES)


@both
def test_lanes_show_each_image_at_most_once(sizes, total):
    for epoch in range(5):
        order = shards_of(sizes).order(3, epoch, total)
        assert order.dtype == np.int64
        assert len(order) == sum(sizes) // total * total
        assert len(set(order.tolist())) == len(order)
        assert set(order.tolist()) <= set(range(sum(sizes)))


@both
def test_lanes_depend_on_seed_and_epoch(sizes, total):
    orders = [
        shards_of(sizes).order(seed, epoch, total).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63 - 1, 5))
    ]
    np.random.seed(1)
    again = shards_of(sizes)
    assert [
        again.order(seed, epoch, total).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63 - 1, 5))
    ] == orders
    assert len(set(map(tuple, orders))) == 4


def test_lanes_are_frozen():
    """Newer versions resume runs within an epoch, so the order must never change."""
    assert shards_of([4, 1, 6]).order(0, 0, 3).tolist() == [2, 4, 10, 0, 3, 5, 1, 8, 9]


@both
def test_lanes_read_shards_in_sequence(sizes, total):
    """A lane jumps at the end of a stretch, at its wrap, and at its own end in the row."""
    steps = sum(sizes) // total
    lanes = shards_of(sizes).order(0, 1, total).reshape(steps, total).T
    jumps = (np.diff(lanes, axis=1) != 1).sum()
    stretches = sum(-(-size // steps) for size in sizes)
    assert jumps <= stretches + 2 * total


def test_lanes_of_long_shards_jump_rarely():
    lanes = shards_of([1000] * 20).order(0, 0, 8).reshape(2500, 8).T
    assert (np.diff(lanes, axis=1) != 1).sum() < 40  # a permutation has 20,000


def test_lanes_leave_out_different_images():
    shown = [set(shards_of([25] * 5).order(0, epoch, 30).tolist()) for epoch in range(20)]
    assert all(len(images) == 120 for images in shown)
    assert set.union(*shown) == set(range(125))
    assert len(set(map(frozenset, shown))) > 5


def test_lanes_mix_many_shards_in_a_batch():
    sizes, total = [50] * 64, 32
    order = shards_of(sizes).order(0, 0, total).reshape(-1, total)
    of_batch = [len({image // 50 for image in batch}) for batch in order.tolist()]
    assert min(of_batch) >= 24  # of 32 images


@pytest.mark.parametrize("sizes, total", [([100] * 13, 64), ([300, 137], 16), ([2000], 64)])
def test_lanes_pair_images_as_a_permutation(sizes, total):
    images, count, epochs = shards_of(sizes), sum(sizes), 200
    steps = count // total
    batch = np.full((epochs, count), -1)
    for epoch in range(epochs):
        batch[epoch, images.order(5, epoch, total)] = np.arange(steps * total) // total

    def meetings(one, other):
        return ((batch[:, one] == batch[:, other]) & (batch[:, one] >= 0)).mean(axis=0)

    chance = (total - 1) / (count - 1)
    first = np.arange(count)
    for distance in (steps, steps + 1, 2 * steps, 5 * steps, count // 2):
        assert meetings(first[:-distance], first[distance:]).mean() == pytest.approx(
            chance, rel=0.15
        ), distance
    pairs = np.random.default_rng(0).integers(0, count, (2, 5000))
    far = pairs[:, abs(pairs[0] - pairs[1]) >= steps]
    often = meetings(*far)
    assert often.mean() == pytest.approx(chance, rel=0.1)
    # No pair meets too often: the largest of 5000 independent counts is off by 5 deviations.
    assert often.max() < chance + 6 * np.sqrt(chance / epochs)
    assert meetings(first[:-1], first[1:]).mean() < chance


@pytest.mark.parametrize("size", [2, 4])
def test_lanes_are_shared_by_workers(size):
    images = shards_of([40, 3, 77])
    single = list(TrainingOrder(images, 8, 0, 1, 0, 2, (0, 3)))
    orders = [list(TrainingOrder(images, 8, rank, size, 0, 2, (0, 3))) for rank in range(size)]
    assert [sum(slices, []) for slices in zip(*orders, strict=True)] == single
    assert len(single) == 2 * (120 // 8) - 3


def test_lanes_of_too_few_images_are_empty():
    assert shards_of([3, 4]).order(0, 0, 8).tolist() == []


# Compared with a folder.


@pytest.fixture(scope="module")
def sets(images, tmp_path_factory):
    """The training images of a folder, and the same ones packed in their order."""
    folder, root = (
        scan(str(images), "train", max_bad=3),
        str(tmp_path_factory.mktemp("packed") / "train"),
    )
    os.makedirs(root)
    contents = [
        (n, folder.names[n], int(folder.labels[n]), folder.content(n)) for n in range(len(folder))
    ]
    for first in range(0, 50, 20):
        write_shard(os.path.join(root, f"{first}.tar"), contents[first : first + 20])
    save_index(
        root,
        folder.classes,
        [read_shard(os.path.join(root, f"{first}.tar")) for first in range(0, 50, 20)],
    )
    return folder, scan(os.path.dirname(root), "train", max_bad=3)


def test_packed_images_read_as_the_folder(sets):
    folder, packed = sets
    assert isinstance(packed, PackedImages)
    assert (packed.classes, len(packed)) == (folder.classes, 50)
    for n in range(50):
        (image, *rest), (expected, *others) = packed.read(n), folder.read(n)
        assert np.array_equal(image, expected)
        assert rest == others == [int(folder.labels[n]), []]


@pytest.mark.slow
def test_packed_images_read_in_loader_processes(sets):
    """Files may be open before the processes get their copies."""
    folder, packed = sets
    packed.content(0)
    view, order = RandomView(16, True), TrainingOrder(packed, 8, 1, 2, 0, 2, (1, 0))
    expected = list(Batches(RandomViews(folder, view, 2, 0), order, 0))
    actual = list(Batches(RandomViews(packed, view, 2, 0), order, 2))
    assert len(actual) == len(expected) == 6
    for (*views, bad), (*others, expected_bad) in zip(actual, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(views, others, strict=True))
        assert bad == expected_bad == []
    batches = every_nth_batch(list(range(50)), 16, 0, 1)
    for (pixels, labels, _), (others, truth, _) in zip(
        Batches(CentreViews(packed, 16), batches, 2),
        Batches(CentreViews(folder, 16), batches, 0),
        strict=True,
    ):
        assert torch.equal(pixels, others) and torch.equal(labels, truth)


def test_packed_undecodable_image_names_its_shard(sets, tmp_path):
    folder, _ = sets
    os.makedirs(tmp_path / "train")
    write_shard(
        str(tmp_path / "train" / "0.tar"),
        [(0, "a/0.png", 0, b"x"), (1, "b/1.png", 1, folder.content(7))],
    )
    save_index(str(tmp_path / "train"), ["a", "b"], [read_shard(str(tmp_path / "train" / "0.tar"))])
    images = scan(str(tmp_path), "train", max_bad=1)
    image, label, bad = images.read(0)
    assert np.array_equal(image, folder.read(7)[0])
    assert (label, bad) == (1, [f"{tmp_path}/train/0.tar:a/0.png: no image of a known format"])


def test_packed_folder_can_be_moved(sets, tmp_path):
    _, packed = sets
    shutil.copytree(packed.root, tmp_path / "elsewhere" / "train")
    assert scan(str(tmp_path / "elsewhere"), "train").content(5) == packed.content(5)
