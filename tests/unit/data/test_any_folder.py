"""Images anywhere below a folder, in lists, and in several folders, with their labels."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from errors import refused
from job.cluster.objects import decode, encode
from job.data.folders import TrainingOrder, scan, scan_validation
from job.data.shards import PackedImages
from job.data.splits import find_images
from job.pack import Options, pack
from job.metrics.log import Log


def png(shade):
    """Return the bytes of an image of one grey."""
    buffer = io.BytesIO()
    Image.new("L", (4, 3), shade).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root, *paths):
    """Write images below a folder. Return it."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(number) if path.lower().endswith(".png") else b"x")
    return root


def scanned(images):
    """Return each image's name, and its class or None."""
    labels = [images.classes[label] if label >= 0 else None for label in images.labels.tolist()]
    return list(zip([images.names[index] for index in range(len(images))], labels, strict=True))


def read_all(images):
    """Return the grey of each image. All must be decodable."""
    read = [images.read(index) for index in range(len(images))]
    assert not any(bad for _, _, bad in read)
    return [int(pixels[0, 0, 0]) for pixels, _, _ in read]


# A folder.


@pytest.mark.parametrize("split", ["", "train"])
def test_flat_images_have_no_labels(tmp_path, split):
    fill(tmp_path / split, "b.png", "a.PNG", "c.txt")
    images = scan(str(tmp_path), "train")
    assert scanned(images) == [("a.PNG", None), ("b.png", None)]
    assert (images.classes, images.labelled) == ([], 0)
    assert images.left_out == f"left out 1 of 3 files in {images.root}: 1 .txt (such as c.txt)"
    assert read_all(images) == [1, 0]


def test_nested_images_have_the_top_folder_s_label(tmp_path):
    fill(
        tmp_path,
        "z.png",
        "2025/05/a.png",
        "2024/a.png",
        "2024/12/31/b.png",
        "empty/x.txt",
        ".cache/c.png",
    )
    images = scan(str(tmp_path), "train")
    assert scanned(images) == [
        ("z.png", None),
        ("2024/a.png", "2024"),
        ("2024/12/31/b.png", "2024"),
        ("2025/05/a.png", "2025"),
    ]
    assert images.labelled == 3 and len(read_all(images)) == 4


def test_validation_images_are_excluded(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png", "val/a/3.png", "val/b/4.png", "deep/val/5.png")
    images = scan(str(tmp_path), "train")
    assert [name for name, _ in scanned(images)] == ["a/1.png", "b/2.png", "deep/val/5.png"]
    assert images.lines == [f"kept for validation: {tmp_path}/val"]
    assert find_images(str(tmp_path))[""].left_out == ""


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_that_is_a_broken_link_is_refused(tmp_path, split):
    """A container may lack its target. Images of other folders must not replace the split's."""
    fill(tmp_path, "test/a/1.png", "b/2.png")
    (tmp_path / split).symlink_to("/nowhere/images")
    message = refused(scan, str(tmp_path), split)
    assert message.startswith(
        f"{tmp_path}/{split} is a link to /nowhere/images, which leads nowhere"
    )
    assert refused(find_images, str(tmp_path)) == message


@pytest.mark.parametrize("name", ["photos", "photos.txt"])
@pytest.mark.parametrize("target", ["/nowhere/photos", "{name}"])
def test_broken_link_in_a_flat_folder_is_refused(tmp_path, name, target):
    """A container may lack the link's folder. A broken link of an image is no error."""
    fill(tmp_path, "1.png", "a/2.png")
    for image in ("gone.png", ".hidden", "a/photos"):
        (tmp_path / image).symlink_to("/nowhere")
    assert len(scan(str(tmp_path), "train")) == 3
    (tmp_path / name).symlink_to(target.format(name=name))
    message = refused(scan, str(tmp_path), "train")
    assert message.startswith(
        f"{tmp_path}/{name} is a link to {target.format(name=name)}, which leads"
    )
    assert refused(find_images, str(tmp_path)) == message


def test_link_within_the_folder_is_left_out(tmp_path):
    """Its images have the label of the folder that contains them, whichever name is first."""
    fill(tmp_path / "in", "b/1.png", "b/deep/2.png", "c/3.png", "val/4.png", ".store/5.png")
    fill(tmp_path / "out", "6.png")
    links = {
        "a": "b",
        "c/b": "../b/deep",
        "d": "val",
        "e": ".store",
        "f": "../out",
        "g": "../out",
        "c/up": "..",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    images = scan(str(tmp_path / "in"), "train")
    assert scanned(images) == [
        ("b/1.png", "b"),
        ("b/deep/2.png", "b"),
        ("c/3.png", "c"),
        ("e/5.png", "e"),
        ("f/6.png", "f"),
    ]
    assert "4 the same folder as another (such as a/)" in images.left_out


@pytest.mark.parametrize("train", ["", "train"])
def test_other_splits_are_a_hint_without_train(tmp_path, train):
    """With train/ they may be classes."""
    fill(
        tmp_path / train,
        "a/1.png",
        "test/1.png",
        "Validation/b/1.png",
        "a/test/1.png",
        "testy/1.png",
    )
    fill(tmp_path, "val/1.png")
    images = scan(str(tmp_path), "train")
    assert images.classes == ["Validation", "a", "test", "testy"]
    shown = f"the run trains on the images in {tmp_path}/Validation, {tmp_path}/test, too."
    hint = f"{shown} To hold them out, move the others into {tmp_path}/train"
    assert images.hints == ({} if train else {"other_split": hint})


def test_hints_of_several_folders_are_joined(tmp_path):
    for name in "xy":
        fill(tmp_path / name, "a/1.png", "test/1.png", "val/1.png")
    images = scan([f"{tmp_path}/x", f"{tmp_path}/y"], "train")
    hints = [part.hints["other_split"] for part in images.parts]
    assert images.hints == {"other_split": "; ".join(hints)} and len(set(hints)) == 2
    assert images.lines == [f"kept for validation: {tmp_path}/x/val, {tmp_path}/y/val"]


def test_classes_that_are_one_folder_are_a_hint(tmp_path):
    fill(tmp_path / "train", "b/1.png", "c/1.png", "d/1.png")
    fill(tmp_path / "out", "1.png")
    links = {"a": "b", "e": "../out"}
    for name, target in links.items():
        (tmp_path / "train" / name).symlink_to(target)
    images = scan(str(tmp_path), "train")
    assert scanned(images) == [(f"{name}/1.png", name) for name in "abcde"]
    shown = f"{tmp_path}/train/a and {tmp_path}/train/b lead to one folder, whose images are in"
    assert images.hints == {"same_folder": f"{shown} both classes. Remove the link"}
    for name in "fg":
        (tmp_path / "train" / name).symlink_to("../out")
    hint = scan(str(tmp_path), "train").hints["same_folder"]
    assert (
        hint
        == f"{shown} both classes (3 more classes are the same folder as another). Remove the link"
    )


def test_validation_classes_match_without_train(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png", "valid/a/3.png", "valid/b/4.png")
    assert scan_validation(str(tmp_path), scan(str(tmp_path), "train")).classes == ["a", "b"]


def test_validation_images_only_are_refused(tmp_path):
    message = refused(scan, str(fill(tmp_path, "val/1.png")), "train")
    assert f"to train on {tmp_path}/val, name that folder" in message


def test_images_outside_class_folders_are_left_out(tmp_path):
    """The order of files that a checkpoint was saved with must not change."""
    fill(tmp_path / "train", "a/1.png", "loose.png")
    images = scan(str(tmp_path), "train")
    assert scanned(images) == [("a/1.png", "a")]
    assert "1 outside the class folders (such as loose.png)" in images.left_out


def test_labels_are_checked_before_validation(tmp_path):
    train = scan(str(fill(tmp_path, "1.png")), "train")
    message = refused(scan_validation, str(tmp_path), train)
    assert (
        message.startswith(f"no image in {tmp_path} has a label")
        and "job.train without --knn-every" in message
    )


# A list.


def listing(path, *lines, ending="\n"):
    """Write a list of paths. Return its own path."""
    path.write_bytes(os.fsencode(ending.join(lines)))
    return str(path)


def test_list_keeps_its_order_without_labels(tmp_path):
    fill(tmp_path / "photos", "a.png", "b.png", "no\udcff.png")
    fill(tmp_path / "else", "c.png")
    file = listing(
        tmp_path / "photos" / "list.txt",
        *(
            "# images of May",
            "",
            "b.png",
            f"  {tmp_path}/else/c.png ",
            "../photos/a.png",
            "no\udcff.png",
            "b.png",
            "n.txt",
        ),
    )
    images = scan(file, "train")
    assert scanned(images)[:2] == [("b.png", None), (f"{tmp_path}/else/c.png", None)]
    assert read_all(images) == [1, 0, 0, 2, 1] and images.root == file and images.labelled == 0
    assert images.left_out == f"left out 1 of 6 files in {file}: 1 .txt (such as n.txt)"
    assert images.common_root == f"{tmp_path}/photos/"


@pytest.mark.parametrize("prefix, ending", [(b"", "\r\n"), (b"\xef\xbb\xbf", "\n")])
def test_list_of_another_system_is_read(tmp_path, prefix, ending):
    fill(tmp_path, "a.png", "b.png")
    file = tmp_path / "list.txt"
    file.write_bytes(prefix + ending.join(["a.png", "b.png", ""]).encode())
    assert [name for name, _ in scanned(scan(str(file), "train"))] == ["a.png", "b.png"]


def test_list_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    listing(fill(tmp_path, "a.png") / "list.txt", "a.png")
    monkeypatch.chdir(tmp_path)
    assert read_all(scan("list.txt", "train")) == [0]


@pytest.mark.parametrize(
    "line", ["gone.png", "gone/a.png", "/gone/a.png", "folder.png", "link.png", "a.png/b.png"]
)
def test_list_refuses_missing_files(tmp_path, line):
    (fill(tmp_path, "a.png") / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    message = refused(scan, listing(tmp_path / "list.txt", "# x", "a.png", line, line), "train")
    assert f"2 of 3 paths lead to no file, such as {line} in line 3" in message
    assert f"from {tmp_path} on" in message and "remove them" in message


def test_list_ignores_other_entries(tmp_path):
    fill(tmp_path, "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert len(scan(listing(tmp_path / "list.txt", "a.png"), "train")) == 1
    message = refused(scan, listing(tmp_path / "list.txt", "loop.png"), "train")
    assert f"cannot read {tmp_path}/loop.png: Too many levels" in message


def test_list_refuses_other_files(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "a.yaml").write_text("lr: 1\n")
    (tmp_path / "empty.txt").touch()
    assert "job.pack --index" in refused(scan, str(tmp_path / "a.tar"), "train")
    for name in ("a.yaml", "empty.txt"):
        assert f"no images in {tmp_path}/{name}" in refused(scan, str(tmp_path / name), "train")
    assert "path a line" in refused(scan, str(tmp_path / "empty.txt"), "train")
    assert "has no validation images" in refused(scan, str(tmp_path / "empty.txt"), "val")


# Several.


@pytest.fixture
def several(tmp_path):
    """Two folders with classes, a folder without, and a list."""
    fill(
        tmp_path / "one",
        "train/a/1.png",
        "train/b/2.png",
        "val/a/3.png",
        "val/b/4.png",
        "val/c/5.png",
    )
    fill(tmp_path / "two", "train/b/6.png", "train/c/7.png", "train/c/8.txt")
    fill(tmp_path / "flat", "9.png")
    listing(tmp_path / "list.txt", "one/val/a/3.png")
    return [str(tmp_path / name) for name in ("one", "two", "flat", "list.txt")]


def test_several_sets_are_joined_by_class_names(several):
    images = scan(several, "train")
    assert scanned(images) == [
        ("a/1.png", "a"),
        ("b/2.png", "b"),
        ("b/6.png", "b"),
        ("c/7.png", "c"),
        ("9.png", None),
        ("one/val/a/3.png", None),
    ]
    assert read_all(images) == [0, 1, 0, 1, 0, 2]
    assert [os.path.exists(images.path(index)) for index in range(6)] == [True] * 6
    assert images.root == f"{several[0]}/train and 3 more" and images.common_root == ""
    assert images.parts[0].common_root == images.parts[0].root
    assert (
        images.left_out == f"left out 1 of 3 files in {several[1]}/train: 1 .txt (such as c/8.txt)"
    )
    assert sorted(images.order(0, 0, 2)) == list(range(6))


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("one", "one"),
        ("one", "one/"),
        ("flat", "two/../flat"),
        ("one", "link"),
        ("list.txt", "./list.txt"),
    ],
)
def test_several_refuse_the_same_source_twice(several, tmp_path, monkeypatch, name, again):
    """Its images would have twice the weight of others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("one")
    message = refused(scan, [name, "two", again], "train")
    assert message == f"{name} and {again}: the same images; expected different ones. Name one"


def test_several_use_each_validation_split(several):
    val = scan_validation(several, scan(several[:2], "train"))
    assert (len(val), val.root) == (3, f"{several[0]}/val")


def test_several_survive_encoding(several):
    images = scan(several, "train", max_bad=3)
    received = decode(encode(images))
    assert scanned(received) == scanned(images) and read_all(received) == read_all(images)
    assert received.digest(0, 1, 2) == images.digest(0, 1, 2) and received.max_bad == 3


def test_several_of_one_equal_the_folder(several):
    folder, one = scan(several[0], "train"), scan(several[:1], "train")
    assert folder.digest(1, 2, 2) == one.digest(1, 2, 2) and folder.root == one.root


@pytest.mark.parametrize("mixed", [False, True])
def test_several_packed_sets_are_joined(several, tmp_path, mixed):
    """The order is in lanes if all are packed."""
    sources = []
    for name in ("one", "two", "flat"):
        pack(
            str(tmp_path / name),
            str(tmp_path / f"packed-{name}"),
            Options(shard_images=1),
            Log(speaks=False),
        )
        sources.append(str(tmp_path / (name if mixed and name == "two" else f"packed-{name}")))
    images = scan(sources, "train")
    assert all(isinstance(part, PackedImages) for part in images.parts) is not mixed
    shown = dict(zip(map(str, scanned(images)), read_all(images), strict=True))
    together = scan(several[:3], "train")
    assert shown == dict(zip(map(str, scanned(together)), read_all(together), strict=True))
    for epoch in range(4):
        order = [index for batch in TrainingOrder(images, 1, 0, 1, epoch, 1) for _, index in batch]
        assert sorted(order) == list(range(5))


def test_packing_keeps_missing_labels(tmp_path):
    fill(tmp_path / "photos", "a.png", "deep/b.png")
    [shard] = pack(str(tmp_path / "photos"), str(tmp_path / "out"), Options(), Log(speaks=False))[
        "train"
    ]
    assert dict(zip(shard.names, shard.labels, strict=True)) == {"a.png": -1, "deep/b.png": 0}
    with tarfile.open(tmp_path / "out" / "train" / "train-000000.tar") as tar:
        assert sum(name.endswith(".cls") for name in tar.getnames()) == 1
    images = scan(str(tmp_path / "out"), "train")
    assert isinstance(images, PackedImages) and np.unique(images.labels).tolist() == [-1, 0]
