"""Image folders, and the order in which workers read them."""

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from errors import refused
from job.data import image_files
from job.data.folders import ImageFolder, TrainingOrder, every_nth_batch, scan, scan_validation
from job.data.shards import PackedImages, save_index
from job.data.tars import Shard


def png():
    """Return the bytes of an image of 4 x 3 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root, *paths, content=None):
    """Write files below a folder: images, or the content given."""
    for path in paths:
        full = os.path.join(os.fsencode(root), os.fsencode(path))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "wb") as file:
            file.write(png() if content is None else content)
    return str(root)


def scanned(images):
    """Return the paths below the root and the labels that a folder has."""
    return [
        (os.path.relpath(images.path(i), images.root), int(images.labels[i]))
        for i in range(len(images))
    ]


def test_scan_sorts_by_class_and_name(tmp_path):
    fill(
        tmp_path / "train",
        "b/2.png",
        "b/10.png",
        "B/1.png",
        "a/z.png",
        "a/deep/er/1.png",
        "a/deep/0.png",
        "a/c/9.png",
    )
    images = scan(str(tmp_path), "train")
    assert images.classes == ["B", "a", "b"]
    assert scanned(images) == [
        ("B/1.png", 0),
        ("a/z.png", 1),
        ("a/c/9.png", 1),
        ("a/deep/0.png", 1),
        ("a/deep/er/1.png", 1),
        ("b/10.png", 2),
        ("b/2.png", 2),
    ]


def test_scan_order_ignores_the_file_system_s(tmp_path, monkeypatch):
    names = [f"{c}/{d}/{n}.png" for c in "ab" for d in "xy" for n in range(4)]
    expected = scanned(scan(fill(tmp_path, *(f"train/{name}" for name in names)), "train"))
    scandir = os.scandir

    class Backwards:
        """The entries of os.scandir in reverse."""

        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert scanned(scan(str(tmp_path), "train")) == expected
    assert len(expected) == 16


def test_scan_keeps_labels_of_empty_classes(tmp_path):
    fill(tmp_path / "train", "a/1.png", "c/1.png")
    (tmp_path / "train" / "b").mkdir()
    images = scan(str(tmp_path), "train")
    assert images.classes == ["a", "b", "c"]
    assert images.labels.tolist() == [0, 2]


def test_scan_leaves_out_other_files(tmp_path):
    fill(tmp_path / "train" / "a", "1.png", "2.JPG", "3.Jpeg", "4.WebP", "5.bmp", "6.TIFF", "7.gif")
    fill(
        tmp_path / "train" / "a",
        "notes.txt",
        "list.csv",
        "png",
        ".png",
        "1.png.part",
        "x.pdf",
        "y.json",
        "z.npy",
        content=b"x",
    )
    fill(tmp_path / "train", "loose.png", "README.md")
    images = scan(str(tmp_path), "train")
    assert [os.path.basename(path) for path, _ in scanned(images)] == [
        "1.png",
        "2.JPG",
        "3.Jpeg",
        "4.WebP",
        "5.bmp",
        "6.TIFF",
        "7.gif",
    ]


def test_left_out_counts_files_by_ending(tmp_path):
    fill(tmp_path / "train", "a/1.png", "a/deep/2.png", "b/3.png")
    assert scan(str(tmp_path), "train").left_out == ""
    fill(
        tmp_path / "train",
        "a/x.cr3",
        "b/deep/y.CR3",
        "b/README",
        "b/4.jpg.part",
        "loose.png",
        content=b"x",
    )
    assert scan(str(tmp_path), "train").left_out == (
        f"left out 5 of 8 files in {tmp_path}/train: 2 .cr3 (such as a/x.cr3), "
        "1 outside the class folders (such as loose.png), 1 .part (such as b/4.jpg.part), "
        "1 without an ending (such as b/README)"
    )


def test_left_out_is_a_short_line(tmp_path):
    fill(
        tmp_path / "train",
        "a/1.png",
        "a/new\nline.txt",
        *(f"a/scan.{number:04d}" for number in range(500)),
    )
    line = scan(str(tmp_path), "train").left_out
    assert line.startswith("left out 501 of 502 files") and line.endswith(
        ", 496 of 496 other kinds"
    )
    assert len(line) < 400 and "\n" not in line and "new\\nline.txt" in line


def test_scan_names_the_endings_of_other_files(tmp_path):
    message = refused(scan, fill(tmp_path, "train/a/1.cr3", "train/a/2.cr3"), "train")
    assert "2 .cr3 (such as a/1.cr3)" in message


LEFT_BEHIND = (
    """
    ._1.png .DS_Store .ipynb_checkpoints .thumbnails .snapshot .zfs .Trash-1000 .nfs000000000a12
    .#1.png .git __MACOSX @eaDir #recycle @Recycle #snapshot lost+found $RECYCLE.BIN
    $Recycle.Bin Thumbs.db thumbs.db desktop.ini
""".split()
    + ["System Volume Information"]
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_scan_leaves_out_leftovers(tmp_path, name):
    """They are a folder in a class, a folder among the classes, or a file. Other images remain."""
    fill(
        tmp_path / "train",
        "a/1.png",
        "_b/2.png",
        f"a/{name}/1.png",
        f"{name}/a/3.png",
        f"_b/{name}",
    )
    images = scan(str(tmp_path), "train")
    assert images.classes == ["_b", "a"]
    assert scanned(images) == [("_b/2.png", 0), ("a/1.png", 1)]
    assert (
        f"left out 3 of 5 files in {tmp_path}/train: 3 hidden or of the system (such as {name})"
        == images.left_out
    )


def test_scan_ignores_unreadable_leftovers(tmp_path):
    """An editor's lock is a broken link, which as a class would be refused."""
    fill(tmp_path / "train", "a/1.png")
    (tmp_path / "train" / ".#a").symlink_to("user@host.1234")
    (tmp_path / "train" / "a" / ".#1.png").symlink_to("user@host.1234")
    assert scanned(scan(str(tmp_path), "train")) == [("a/1.png", 0)]


def test_scan_accepts_a_hidden_root(tmp_path):
    root = tmp_path / ".cache" / "lost+found"
    fill(root / "train", "a/1.png")
    images = scan(str(root), "train")
    assert (scanned(images), images.left_out) == ([("a/1.png", 0)], "")


@pytest.mark.parametrize(
    ("present", "used"), [(["val"], "val"), (["valid"], "valid"), (["val", "valid"], "val")]
)
def test_scan_uses_the_first_existing_split(tmp_path, present, used):
    fill(tmp_path, *(f"{split}/a/1.png" for split in present))
    assert scan(str(tmp_path), "val", "valid").root == str(tmp_path / used)


def test_scan_ignores_a_trailing_slash(tmp_path):
    fill(tmp_path / "train", "a/1.png")
    assert (
        scanned(scan(f"{tmp_path}/", "train"))
        == scanned(scan(str(tmp_path), "train"))
        == [("a/1.png", 0)]
    )


def test_scan_reads_names_of_any_bytes(tmp_path):
    names = [
        "größe/é.png",
        "日本/猫.png",
        b"caf\xe9/\xff\xfe.png",
        "with space/a b.png",
        "new\nline/1.png",
    ]
    fill(tmp_path / "train", *names)
    images = scan(str(tmp_path), "train")
    assert {os.fsencode(path) for path, _ in scanned(images)} == {
        os.fsencode(name) for name in names
    }
    for index in range(len(images)):
        image, label, bad = images.read(index)
        assert (image.shape, label, bad) == ((3, 4, 3), index, [])


def test_scan_follows_links(tmp_path):
    fill(tmp_path / "store", "cats/1.png", "2.png")
    fill(tmp_path / "train", "dogs/1.png")
    (tmp_path / "train" / "cats").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "train" / "dogs" / "2.png").symlink_to(tmp_path / "store" / "2.png")
    images = scan(str(tmp_path), "train")
    assert scanned(images) == [("cats/1.png", 0), ("dogs/1.png", 1), ("dogs/2.png", 1)]
    assert all(images.read(index)[2] == [] for index in range(3))


def test_scan_follows_no_loop_of_links(tmp_path):
    fill(tmp_path / "store", "1.png")
    fill(tmp_path / "train", "a/1.png", "a/deep/2.png", "b/3.png", "c/4.png")
    for link, target in {
        "a/store": tmp_path / "store",
        "a/again": tmp_path / "store",
        "a/up": "..",
        "a/deep/b": "../../b",
    }.items():
        (tmp_path / "train" / link).symlink_to(target)
    (tmp_path / "train" / "b" / "a").symlink_to("../a/deep")
    (tmp_path / "train" / "b" / "self").symlink_to("self")
    names = [name for name, _ in scanned(scan(str(tmp_path), "train"))]
    assert names == [
        "a/1.png",
        "a/again/1.png",
        "a/deep/2.png",
        "a/deep/b/3.png",
        "b/3.png",
        "b/a/2.png",
        "c/4.png",
    ]


@pytest.mark.parametrize("target", ["nowhere", ".", "..", "c", "../train"])
def test_scan_refuses_classes_that_are_bad_links(tmp_path, target):
    fill(tmp_path / "train", "a/1.png")
    (tmp_path / "train" / "c").symlink_to(target)
    message = refused(scan, str(tmp_path), "train")
    assert f"{tmp_path}/train/c is a link to {target}" in message
    assert "remove it" in message


@pytest.mark.parametrize("kind", ["pipe", "device", "long"])
def test_content_refuses_irregular_files(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(image_files, "LARGEST_FILE", 100)
    fill(tmp_path, "train/a/1.png", content=bytes(101 if kind == "long" else 1))
    images = scan(str(tmp_path), "train")
    if kind != "long":
        os.remove(images.path(0))
        os.mkfifo(images.path(0)) if kind == "pipe" else os.symlink("/dev/zero", images.path(0))
    with pytest.raises(OSError, match="101 bytes" if kind == "long" else "not a regular file"):
        images.content(0)


@pytest.mark.parametrize("made", ["missing", "empty", "train is a file"])
def test_scan_names_a_missing_split(tmp_path, made):
    data = tmp_path / "data"
    if made != "missing":
        data.mkdir()
    if made == "train is a file":
        (data / "train").write_text("x")
    message = refused(scan, str(data), "train")
    assert str(data) in message
    assert ("expected a folder of images" if made == "missing" else "train/<class>/*") in message


def test_scan_names_both_validation_splits(tmp_path):
    message = refused(scan, fill(tmp_path, "train/a/1.png"), "val", "valid")
    assert "val or valid" in message


@pytest.mark.parametrize("files", [[], ["a/notes.txt"], ["a/b/notes.txt"]])
def test_scan_names_an_empty_split(tmp_path, files):
    (tmp_path / "train" / "a").mkdir(parents=True)
    message = refused(
        scan, fill(tmp_path, *(f"train/{file}" for file in files), content=b"x"), "train"
    )
    assert str(tmp_path / "train") in message
    assert "<class>/*" in message


def test_scan_names_tar_files_without_an_index(tmp_path):
    message = refused(scan, fill(tmp_path, "train/0.tar", content=b"x"), "train")
    assert f"python -m job.pack --index {tmp_path}" in message


@pytest.mark.parametrize(
    "val, differs", [(["a", "b"], None), (["a"], "b"), (["a", "b", "c"], "c"), (["a", "B"], "B, b")]
)
def test_validation_refuses_other_classes(tmp_path, val, differs):
    fill(tmp_path, "train/a/1.png", "train/b/1.png", *(f"valid/{name}/1.png" for name in val))
    train = scan(str(tmp_path), "train", max_bad=7)
    if differs:
        assert refused(scan_validation, str(tmp_path), train).endswith(
            f"in one of them only: {differs}"
        )
    else:
        assert scan_validation(str(tmp_path), train).max_bad == 7


def test_content_is_the_file_s_bytes(tmp_path):
    images = scan(fill(tmp_path, "train/a/1.png", "train/b/x y.png"), "train")
    assert [images.content(i) for i in range(2)] == [png()] * 2


def test_image_folder_pickles_small(tmp_path):
    paths = [f"class_{i % 10:04d}/image_{i:08d}.jpeg" for i in range(5000)]
    images = ImageFolder("root", ["c"], paths, [0] * len(paths), 0)
    assert len(pickle.dumps(images)) < 5000 * (len(paths[0]) + 8 + 8) + 2000
    assert [images.path(i) for i in (0, 1, 4999)] == [
        os.path.join("root", paths[i]) for i in (0, 1, 4999)
    ]


# The batches of each worker.


def order_of(images, seed=0, start=(0, 0), **setting):
    """Return the order of one worker over a number of images."""
    names = [f"a/{number}.png" for number in range(images)]
    folder = ImageFolder("root", ["a"], names, [0] * images, 0)
    return TrainingOrder(folder, rank=0, size=1, seed=seed, start=start, **setting)


def test_order_differs_between_epochs():
    batches = list(order_of(images=32, total=8, epochs=3))
    assert [batch[0][0] for batch in batches] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len({epoch for epoch, _ in batch}) == 1 for batch in batches)
    by_epoch = [
        [index for batch in batches for e, index in batch if e == epoch] for epoch in range(3)
    ]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2] != by_epoch[0]
    assert by_epoch[0] != list(range(32))
    other = [
        index for batch in order_of(seed=1, images=32, total=8, epochs=1) for _, index in batch
    ]
    assert other != by_epoch[0]


def test_order_past_the_last_epoch_is_empty():
    order = order_of(start=(5, 0), images=10, total=2, epochs=3)
    assert list(order) == []
    assert len(order) == 0


def test_order_can_be_iterated_twice():
    order = order_of(images=10, total=2, epochs=2)
    assert list(order) == list(order)


# Any folder or shards.


@pytest.fixture(scope="module")
def images_of(tmp_path_factory):
    """A function: sizes of shards -> images packed in them, or a number -> images of a folder."""
    root = tmp_path_factory.mktemp("packed")

    def make(sizes):
        if isinstance(sizes, int):
            return ImageFolder(
                "root",
                ["a"],
                [f"a/{number}.png" for number in range(sizes)],
                [0] * sizes,
                max_bad=0,
            )
        shards = [
            Shard(
                f"{n}.tar",
                0,
                [0] * size,
                [0] * size,
                [0] * size,
                [f"a/{n}-{k}.png" for k in range(size)],
            )
            for n, size in enumerate(sizes)
        ]
        for shard in shards:
            open(os.path.join(root, shard.name), "wb").close()
        save_index(str(root), ["a"], shards)
        return PackedImages(str(root), max_bad=0)

    return make


SHARDS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)
SIZES = st.integers(1, 80) | SHARDS


@st.composite
def settings(draw):
    """Images, N, and the arguments of an order: a total batch of N workers, a seed, epochs."""
    N, batch = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return (
        draw(SIZES),
        N,
        dict(total=N * batch, seed=draw(st.integers(0, 2**63 - 1)), epochs=draw(st.integers(1, 3))),
    )


@given(setting=settings())
def test_order_slices_join_to_one_worker_s_batch(images_of, setting):
    sizes, N, setting = setting
    images = images_of(sizes)
    single = list(TrainingOrder(images, rank=0, size=1, **setting))
    orders = [TrainingOrder(images, rank=rank, size=N, **setting) for rank in range(N)]
    assert all(len(order) == len(single) for order in orders)
    for batch, *slices in zip(single, *orders, strict=True):
        assert [len(each) for each in slices] == [len(batch) // N] * N
        assert sum(slices, []) == batch


@given(setting=settings())
def test_order_shows_each_image_once_an_epoch(images_of, setting):
    sizes, _, setting = setting
    images, total = images_of(sizes), setting["total"]
    batches = list(TrainingOrder(images, rank=0, size=1, **setting))
    steps = len(images) // total  # fewer images than a batch are left over
    assert len(batches) == steps * setting["epochs"]
    for epoch in range(setting["epochs"]):
        shown = sum(batches[epoch * steps : (epoch + 1) * steps], [])
        assert {e for e, _ in shown} <= {epoch}
        assert len({index for _, index in shown}) == steps * total
        assert all(0 <= index < len(images) for _, index in shown)


@given(setting=settings(), data=st.data())
def test_order_resumes_at_any_position(images_of, setting, data):
    sizes, N, setting = setting
    images, rank = images_of(sizes), data.draw(st.integers(0, N - 1))
    full = list(TrainingOrder(images, rank=rank, size=N, **setting))
    steps = len(images) // setting["total"]
    start = (
        data.draw(st.integers(0, setting["epochs"])),
        data.draw(st.integers(0, max(0, steps - 1))),
    )
    order = TrainingOrder(images, rank=rank, size=N, start=start, **setting)
    tail = full[start[0] * steps + start[1] :]
    assert list(order) == tail
    assert len(order) == len(tail)


@given(
    sizes=SIZES,
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    total=st.integers(1, 40),
)
def test_order_depends_on_seed_and_epoch(images_of, sizes, seed, epoch, total):
    one, other = images_of(sizes), images_of(sizes)
    other.order(seed, epoch + 1, total)
    assert np.array_equal(one.order(seed, epoch, total), other.order(seed, epoch, total))
    assert one.digest(seed, epoch, total) == other.digest(seed, epoch, total)


@given(
    images=st.lists(st.integers(0, 10**6), max_size=60),
    batch=st.integers(1, 9),
    size=st.integers(1, 7),
)
def test_every_nth_batch_partitions_the_batches(images, batch, size):
    of_workers = [every_nth_batch(images, batch, rank, size) for rank in range(size)]
    counts = [len(batches) for batches in of_workers]
    assert max(counts) - min(counts) <= 1
    joined = [
        batches[turn]
        for turn in range(max(counts))
        for batches in of_workers
        if turn < len(batches)
    ]
    assert joined == every_nth_batch(images, batch, 0, 1)
    assert all(len(each) == batch for each in joined[:-1]) and sum(joined, []) == images
