import os
import shutil
import subprocess

import pytest
import webdataset

from job.data.folders import scan, scan_validation
from job.errors import RunError
from job.index import index
from job.run.log import Log


def refused(data):
    with pytest.raises(RunError) as caught:
        index(str(data), Log(speaks=False))
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2
    return str(caught.value)


def webdataset_of(images, root, name, per_shard=20):
    """Write the images of a split by webdataset's own writer, with labels only; return the split."""
    os.makedirs(root)
    with webdataset.ShardWriter(f"{root}/{name}-%04d.tar", maxcount=per_shard, verbose=0) as writer:
        for number in range(len(images)):
            writer.write({"__key__": f"{number:05d}", "png": images.content(number), "cls": int(images.labels[number])})
    return images


@pytest.fixture
def shards(images, tmp_path):
    """A folder of webdataset's shards, and the splits that they have the images of."""
    train, val = scan(str(images), "train"), scan(str(images), "val")
    return tmp_path / "data", [
        webdataset_of(split, tmp_path / "data" / name, name) for split, name in ((train, "train"), (val, "val"))
    ]


def test_shards_of_webdataset_hold_the_images_and_labels_that_were_written(shards):
    data, (train, val) = shards
    assert "has no index" not in refused(data / "train")
    with pytest.raises(RunError, match="its tar files have no index: python -m job.pack --index"):
        scan(str(data), "train")
    found = index(str(data), Log(speaks=False))
    assert {split: [len(shard.names) for shard in some] for split, some in found.items()} == {"train": [20, 20, 10], "val": [9]}
    packed = scan(str(data), "train")
    for images, expected in ((packed, train), (scan_validation(str(data), packed), val)):
        assert images.classes == ["0", "1"]
        assert images.labels.tolist() == expected.labels.tolist()
        assert [images.content(n) for n in range(len(images))] == [expected.content(n) for n in range(len(expected))]


def test_an_index_made_again_has_the_same_bytes(shards):
    data, _ = shards
    index(str(data), Log(speaks=False))
    before = (data / "train" / "index.npz").read_bytes()
    index(str(data), Log(speaks=False))
    assert (data / "train" / "index.npz").read_bytes() == before


def test_a_shard_that_came_later_is_found_when_the_index_is_made_again(shards):
    data, _ = shards
    index(str(data), Log(speaks=False))
    shutil.copy(data / "val" / "val-0000.tar", data / "train" / "train-0003.tar")
    index(str(data), Log(speaks=False))
    assert len(scan(str(data), "train")) == 59


def tarred(root, labels):
    """Shards by `tar` of images whose names and labels are given, in `root`/train."""
    for name, label in labels.items():
        path = root / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        path.with_suffix(".cls").write_text(str(label))
    (root / "train").mkdir()
    subprocess.run(
        ["tar", "-C", root / "in", "--sort=name", "-cf", root / "train" / "0.tar", *os.listdir(root / "in")], check=True
    )
    index(str(root), Log(speaks=False))
    return scan(str(root), "train").classes


def test_classes_have_the_names_of_their_folders(tmp_path):
    assert tarred(tmp_path, {"dog/1.jpg": 1, "dog/more/2.jpg": 1, "cat/3.jpg": 0}) == ["cat", "dog"]


def test_a_class_without_images_has_its_number_for_a_name(tmp_path):
    assert tarred(tmp_path, {"dog/1.jpg": 2, "cat/3.jpg": 0}) == ["cat", "1", "dog"]


@pytest.mark.parametrize(
    "labels",
    [{"all/1.jpg": 0, "all/2.jpg": 1}, {"a/1.jpg": 0, "b/2.jpg": 0, "c/3.jpg": 1}, {"1.jpg": 0, "b/2.jpg": 1}],
    ids=["one for all", "two for one", "none for one"],
)
def test_folders_that_are_no_classes_give_no_names(tmp_path, labels):
    assert tarred(tmp_path, labels) == ["0", "1"]


def test_where_there_are_no_shards_it_is_said_where_they_should_be(tmp_path):
    assert f"expected {tmp_path}/none/train/*.tar" in refused(tmp_path / "none")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar.gz").write_bytes(b"x")
    assert "not compressed" in refused(tmp_path)
    assert "move or link" not in refused(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"x")
    assert f"move or link those of {tmp_path}" in refused(tmp_path)


def test_a_folder_is_no_shard_whatever_its_name(shards):
    data, _ = shards
    (data / "train" / "more.tar").mkdir()
    assert len(index(str(data), Log(speaks=False))["train"]) == 3


def test_shards_without_images_are_refused_and_no_index_is_written(tmp_path):
    (tmp_path / "train").mkdir()
    with webdataset.TarWriter(str(tmp_path / "train" / "0.tar")) as writer:
        writer.write({"__key__": "a", "txt": "text", "cls": 1})
    assert f"no images in the shards of {tmp_path}/train" in refused(tmp_path)
    assert os.listdir(tmp_path / "train") == ["0.tar"]


def test_one_damaged_shard_is_named_and_no_index_is_written(shards):
    data, _ = shards
    os.truncate(data / "val" / "val-0000.tar", 3000)
    assert f"{data}/val/val-0000.tar" in refused(data)
    assert not list(data.glob("*/index.npz*"))
