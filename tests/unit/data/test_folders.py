import io
import os
import pickle

import pytest
from PIL import Image

from errors import refused
from job.data import image_files
from job.data.folders import ImageFolder, TrainingOrder, every_nth_batch, scan, scan_validation


def png():
    """The bytes of an image of 4 x 3 pixels."""
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


def found_in(images):
    """The paths below the root and the labels that a folder has."""
    return [
        (os.path.relpath(images.path(i), images.root), int(images.labels[i]))
        for i in range(len(images))
    ]


def test_images_come_sorted_by_class_folder_and_name(tmp_path):
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
    assert found_in(images) == [
        ("B/1.png", 0),
        ("a/z.png", 1),
        ("a/c/9.png", 1),
        ("a/deep/0.png", 1),
        ("a/deep/er/1.png", 1),
        ("b/10.png", 2),
        ("b/2.png", 2),
    ]


def test_the_order_is_not_that_of_the_file_system(tmp_path, monkeypatch):
    names = [f"{c}/{d}/{n}.png" for c in "ab" for d in "xy" for n in range(4)]
    expected = found_in(scan(fill(tmp_path, *(f"train/{name}" for name in names)), "train"))
    scandir = os.scandir

    class Backwards:
        """What os.scandir gives, the other way round."""

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
    assert found_in(scan(str(tmp_path), "train")) == expected
    assert len(expected) == 16


def test_a_class_without_images_keeps_its_label(tmp_path):
    fill(tmp_path / "train", "a/1.png", "c/1.png")
    (tmp_path / "train" / "b").mkdir()
    images = scan(str(tmp_path), "train")
    assert images.classes == ["a", "b", "c"]
    assert images.labels.tolist() == [0, 2]


def test_files_that_are_no_images_are_left_out(tmp_path):
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
    assert [os.path.basename(path) for path, _ in found_in(images)] == [
        "1.png",
        "2.JPG",
        "3.Jpeg",
        "4.WebP",
        "5.bmp",
        "6.TIFF",
        "7.gif",
    ]


def test_files_left_out_are_counted_by_ending_with_an_example(tmp_path):
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
        f"left out 5 of 8 files in {tmp_path}/train: 2 .cr3 (such as a/x.cr3), 1 outside the class folders (such as "
        "loose.png), 1 .part (such as b/4.jpg.part), 1 without an ending (such as b/README)"
    )


def test_a_line_about_files_left_out_stays_short(tmp_path):
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


def test_a_folder_whose_images_all_have_other_endings_says_which(tmp_path):
    message = refused(scan, fill(tmp_path, "train/a/1.cr3", "train/a/2.cr3"), "train")
    assert "2 .cr3 (such as a/1.cr3)" in message


LEFT_BEHIND = (
    """
    ._1.png .DS_Store .ipynb_checkpoints .thumbnails .snapshot .zfs .Trash-1000 .nfs000000000a12 .#1.png .git __MACOSX @eaDir
    #recycle @Recycle #snapshot lost+found $RECYCLE.BIN $Recycle.Bin Thumbs.db thumbs.db desktop.ini
""".split()
    + ["System Volume Information"]
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_systems_and_tools_leave_behind_is_neither_image_nor_class(tmp_path, name):
    """As a folder in a class, beside the classes, and as a file; an image beside it in the same class remains."""
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
    assert found_in(images) == [("_b/2.png", 0), ("a/1.png", 1)]
    assert (
        f"left out 3 of 5 files in {tmp_path}/train: 3 hidden or of the system (such as {name})"
        == images.left_out
    )


def test_a_leftover_that_cannot_be_followed_or_read_is_passed_over(tmp_path):
    """An editor's lock is a link to nowhere, which as a class would be refused."""
    fill(tmp_path / "train", "a/1.png")
    (tmp_path / "train" / ".#a").symlink_to("user@host.1234")
    (tmp_path / "train" / "a" / ".#1.png").symlink_to("user@host.1234")
    assert found_in(scan(str(tmp_path), "train")) == [("a/1.png", 0)]


def test_data_may_lie_in_a_hidden_folder(tmp_path):
    root = tmp_path / ".cache" / "lost+found"
    fill(root / "train", "a/1.png")
    images = scan(str(root), "train")
    assert (found_in(images), images.left_out) == ([("a/1.png", 0)], "")


@pytest.mark.parametrize(
    ("present", "taken"), [(["val"], "val"), (["valid"], "valid"), (["val", "valid"], "val")]
)
def test_the_first_split_that_is_there_is_taken(tmp_path, present, taken):
    fill(tmp_path, *(f"{split}/a/1.png" for split in present))
    assert scan(str(tmp_path), "val", "valid").root == str(tmp_path / taken)


def test_a_trailing_slash_changes_nothing(tmp_path):
    fill(tmp_path / "train", "a/1.png")
    assert (
        found_in(scan(f"{tmp_path}/", "train"))
        == found_in(scan(str(tmp_path), "train"))
        == [("a/1.png", 0)]
    )


def test_names_of_any_bytes_are_found_and_read(tmp_path):
    names = [
        "größe/é.png",
        "日本/猫.png",
        b"caf\xe9/\xff\xfe.png",
        "with space/a b.png",
        "new\nline/1.png",
    ]
    fill(tmp_path / "train", *names)
    images = scan(str(tmp_path), "train")
    assert {os.fsencode(path) for path, _ in found_in(images)} == {
        os.fsencode(name) for name in names
    }
    for index in range(len(images)):
        image, label, bad = images.read(index)
        assert (image.shape, label, bad) == ((3, 4, 3), index, [])


def test_links_are_followed_to_classes_and_images(tmp_path):
    fill(tmp_path / "store", "cats/1.png", "2.png")
    fill(tmp_path / "train", "dogs/1.png")
    (tmp_path / "train" / "cats").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "train" / "dogs" / "2.png").symlink_to(tmp_path / "store" / "2.png")
    images = scan(str(tmp_path), "train")
    assert found_in(images) == [("cats/1.png", 0), ("dogs/1.png", 1), ("dogs/2.png", 1)]
    assert all(images.read(index)[2] == [] for index in range(3))


def test_links_below_a_class_are_followed_but_not_in_a_loop(tmp_path):
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
    names = [name for name, _ in found_in(scan(str(tmp_path), "train"))]
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
def test_a_class_that_is_a_link_to_nowhere_or_back_is_refused(tmp_path, target):
    fill(tmp_path / "train", "a/1.png")
    (tmp_path / "train" / "c").symlink_to(target)
    message = refused(scan, str(tmp_path), "train")
    assert f"{tmp_path}/train/c is a link to {target}" in message
    assert "remove it" in message


@pytest.mark.parametrize("kind", ["pipe", "device", "long"])
def test_what_is_no_image_s_file_is_not_read(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(image_files, "LARGEST_FILE", 100)
    fill(tmp_path, "train/a/1.png", content=bytes(101 if kind == "long" else 1))
    images = scan(str(tmp_path), "train")
    if kind != "long":
        os.remove(images.path(0))
        os.mkfifo(images.path(0)) if kind == "pipe" else os.symlink("/dev/zero", images.path(0))
    with pytest.raises(OSError, match="101 bytes" if kind == "long" else "not a regular file"):
        images.content(0)


@pytest.mark.parametrize("made", ["missing", "empty", "train is a file"])
def test_a_folder_without_the_split_is_named_with_what_it_should_have(tmp_path, made):
    data = tmp_path / "data"
    if made != "missing":
        data.mkdir()
    if made == "train is a file":
        (data / "train").write_text("x")
    message = refused(scan, str(data), "train")
    assert str(data) in message
    assert "train/<class>/*" in message


def test_a_folder_without_val_or_valid_names_both(tmp_path):
    message = refused(scan, fill(tmp_path, "train/a/1.png"), "val", "valid")
    assert "val or valid" in message


@pytest.mark.parametrize("files", [[], ["a/notes.txt"], ["a/b/notes.txt"]])
def test_a_split_without_images_is_named(tmp_path, files):
    (tmp_path / "train" / "a").mkdir(parents=True)
    message = refused(
        scan, fill(tmp_path, *(f"train/{file}" for file in files), content=b"x"), "train"
    )
    assert str(tmp_path / "train") in message
    assert "<class>/*" in message


def test_tar_files_without_an_index_are_recognised_with_what_to_do(tmp_path):
    message = refused(scan, fill(tmp_path, "train/0.tar", content=b"x"), "train")
    assert f"python -m job.pack --index {tmp_path}" in message


@pytest.mark.parametrize(
    "val, differs", [(["a", "b"], None), (["a"], "b"), (["a", "b", "c"], "c"), (["a", "B"], "B, b")]
)
def test_validation_images_must_have_the_classes_of_the_training_images(tmp_path, val, differs):
    fill(tmp_path, "train/a/1.png", "train/b/1.png", *(f"valid/{name}/1.png" for name in val))
    train = scan(str(tmp_path), "train", max_bad=7)
    if differs:
        assert refused(scan_validation, str(tmp_path), train).endswith(
            f"in one of them only: {differs}"
        )
    else:
        assert scan_validation(str(tmp_path), train).max_bad == 7


def test_an_image_s_content_is_its_file_s_bytes(tmp_path):
    images = scan(fill(tmp_path, "train/a/1.png", "train/b/x y.png"), "train")
    assert [images.content(i) for i in range(2)] == [png()] * 2


def test_a_folder_of_images_is_small_when_sent_to_another_process(tmp_path):
    paths = [f"class_{i % 10:04d}/image_{i:08d}.jpeg" for i in range(5000)]
    images = ImageFolder("root", ["c"], paths, [0] * len(paths), 0)
    assert len(pickle.dumps(images)) < 5000 * (len(paths[0]) + 8 + 8) + 2000
    assert [images.path(i) for i in (0, 1, 4999)] == [
        os.path.join("root", paths[i]) for i in (0, 1, 4999)
    ]


# Which images a worker takes.

ORDERS = [
    dict(images=50, total=8, epochs=3),
    dict(images=16, total=16, epochs=2),
    dict(images=17, total=4, epochs=2),
]


def orders(size, images, seed=0, start=(0, 0), **setting):
    """What each of `size` workers takes of so many images."""
    folder = ImageFolder(
        "root", ["a"], [f"a/{number}.png" for number in range(images)], [0] * images, 0
    )
    return [
        TrainingOrder(folder, rank=rank, size=size, seed=seed, start=start, **setting)
        for rank in range(size)
    ]


@pytest.mark.parametrize("setting", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shares_of_a_step_are_one_batch_for_any_number_of_workers(setting, size):
    whole = list(orders(1, **setting)[0])
    shares = [list(order) for order in orders(size, **setting)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert all(len(part) == setting["total"] // size for part in parts)
        assert sum(parts, []) == batch
        assert len(set(batch)) == setting["total"]


@pytest.mark.parametrize("setting", ORDERS)
def test_an_epoch_shows_each_image_at_most_once_and_leaves_out_less_than_a_batch(setting):
    batches = list(orders(1, **setting)[0])
    for epoch in range(setting["epochs"]):
        shown = [index for batch in batches for e, index in batch if e == epoch]
        assert (
            len(shown)
            == len(set(shown))
            == setting["images"] // setting["total"] * setting["total"]
        )
        assert set(shown) <= set(range(setting["images"]))


def test_epochs_come_in_turn_and_each_has_an_order_of_its_own():
    batches = list(orders(1, images=32, total=8, epochs=3)[0])
    assert [batch[0][0] for batch in batches] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(len({epoch for epoch, _ in batch}) == 1 for batch in batches)
    by_epoch = [
        [index for batch in batches for e, index in batch if e == epoch] for epoch in range(3)
    ]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2] != by_epoch[0]
    assert by_epoch[0] != list(range(32))
    other = [
        index for batch in orders(1, seed=1, images=32, total=8, epochs=1)[0] for _, index in batch
    ]
    assert other != by_epoch[0]


@pytest.mark.parametrize("setting", ORDERS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_start_within_the_run_gives_exactly_its_tail(setting, size):
    steps = setting["images"] // setting["total"]
    for rank in range(size):
        whole = list(orders(size, **setting)[rank])
        assert len(whole) == len(orders(size, **setting)[rank]) == steps * setting["epochs"]
        for epoch in range(setting["epochs"] + 1):
            for step in range(steps if epoch < setting["epochs"] else 1):
                order = orders(size, start=(epoch, step), **setting)[rank]
                tail = whole[epoch * steps + step :]
                assert list(order) == tail
                assert len(order) == len(tail)


def test_an_order_past_the_last_epoch_is_empty():
    order = orders(1, start=(5, 0), images=10, total=2, epochs=3)[0]
    assert list(order) == []
    assert len(order) == 0


def test_an_order_can_be_gone_through_again():
    order = orders(1, images=10, total=2, epochs=2)[0]
    assert list(order) == list(order)


@pytest.mark.parametrize("images", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_nth_batch_is_a_partition_whose_batches_do_not_depend_on_the_workers(images, size):
    sample = [7 * i % 101 for i in range(images)]
    whole = every_nth_batch(sample, 8, 0, 1)
    assert sum(whole, []) == sample
    assert all(len(batch) == 8 for batch in whole[:-1])
    shares = [every_nth_batch(sample, 8, rank, size) for rank in range(size)]
    assert sorted(batch for share in shares for batch in share) == sorted(whole)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
