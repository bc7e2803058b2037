"""The index of existing tar shards."""

import os
import shutil
import subprocess

import pytest
import webdataset

from job.data.folders import scan, scan_validation
from job.errors import RunError
from job.data.index import index
from job.data.tars import write_shard
from job.metrics.log import Log


def refused(data):
    with pytest.raises(RunError) as caught:
        index(str(data), Log(speaks=False))
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2
    return str(caught.value)


def webdataset_of(images, root, name, per_shard=20):
    """Write the images of a split by webdataset's own writer, with labels. Return the split."""
    os.makedirs(root)
    with webdataset.ShardWriter(f"{root}/{name}-%04d.tar", maxcount=per_shard, verbose=0) as writer:
        for number in range(len(images)):
            writer.write(
                {
                    "__key__": f"{number:05d}",
                    "png": images.content(number),
                    "cls": int(images.labels[number]),
                }
            )
    return images


@pytest.fixture
def shards(images, tmp_path):
    """A folder of webdataset's shards, and the splits of the same images."""
    train, val = scan(str(images), "train"), scan(str(images), "val")
    return tmp_path / "data", [
        webdataset_of(split, tmp_path / "data" / name, name)
        for split, name in ((train, "train"), (val, "val"))
    ]


def test_index_reads_webdataset_s_shards(shards):
    data, (train, val) = shards
    with pytest.raises(RunError, match="its tar files have no index: python -m job.pack --index"):
        scan(str(data), "train")
    actual = index(str(data), Log(speaks=False))
    assert {split: [len(shard.names) for shard in some] for split, some in actual.items()} == {
        "train": [20, 20, 10],
        "val": [9],
    }
    packed = scan(str(data), "train")
    for images, expected in ((packed, train), (scan_validation(str(data), packed), val)):
        assert images.classes == ["0", "1"]
        assert images.labels.tolist() == expected.labels.tolist()
        assert [images.content(n) for n in range(len(images))] == [
            expected.content(n) for n in range(len(expected))
        ]


def test_index_rewritten_has_the_same_bytes(shards):
    data, _ = shards
    index(str(data), Log(speaks=False))
    before = (data / "train" / "index.npz").read_bytes()
    index(str(data), Log(speaks=False))
    assert (data / "train" / "index.npz").read_bytes() == before


def test_index_rewritten_includes_new_shards(shards):
    data, _ = shards
    index(str(data), Log(speaks=False))
    shutil.copy(data / "val" / "val-0000.tar", data / "train" / "train-0003.tar")
    index(str(data), Log(speaks=False))
    assert len(scan(str(data), "train")) == 59


def tarred(root, labels, dot=False):
    """Write shards by `tar` of images {name: label} to `root`/train. Return the classes."""
    for name, label in labels.items():
        path = root / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        path.with_suffix(".cls").write_text(str(label))
    (root / "train").mkdir()
    subprocess.run(
        [
            "tar",
            "-C",
            root / "in",
            "--sort=name",
            "-cf",
            root / "train" / "0.tar",
            *(["."] if dot else os.listdir(root / "in")),
        ],
        check=True,
    )
    index(str(root), Log(speaks=False))
    return scan(str(root), "train").classes


@pytest.mark.parametrize(
    ("labels", "dot", "classes"),
    [
        ({"dog/1.jpg": 1, "dog/more/2.jpg": 1, "cat/3.jpg": 0}, False, ["cat", "dog"]),
        ({"dog/1.jpg": 1, "cat/3.jpg": 0}, True, ["cat", "dog"]),  # as `tar cf 0.tar .` writes
        ({"dog/1.jpg": 2, "cat/3.jpg": 0}, False, ["cat", "1", "dog"]),
    ],
    ids=["folder in a folder", "leading dot", "class without images"],
)
def test_classes_are_named_by_folders(tmp_path, labels, dot, classes):
    assert tarred(tmp_path, labels, dot=dot) == classes


@pytest.mark.parametrize(
    "labels",
    [
        {"all/1.jpg": 0, "all/2.jpg": 1},
        {"a/1.jpg": 0, "b/2.jpg": 0, "c/3.jpg": 1},
        {"1.jpg": 0, "b/2.jpg": 1},
    ],
    ids=["one for all", "two for one", "none for one"],
)
def test_classes_of_mixed_folders_are_numbers(tmp_path, labels):
    assert tarred(tmp_path, labels) == ["0", "1"]


@pytest.fixture
def logged(capsys):
    """A function that indexes a folder and returns the log lines, except the progress."""

    def lines(data):
        index(str(data), Log(speaks=True))
        return [
            line for line in capsys.readouterr().out.splitlines() if not line.startswith("indexing")
        ]

    return lines


def unlabelled(root, split, labels, key="{:05d}"):
    """Write a shard of images, some with a label. Return the folder of the data."""
    os.makedirs(root / split)
    with webdataset.TarWriter(f"{root}/{split}/0.tar") as writer:
        for number, label in enumerate(labels):
            image = {"__key__": key.format(number), "jpg": b"image %d" % number}
            writer.write(image | ({} if label is None else {"cls": label}))
    return root


def test_index_allows_training_without_labels(tmp_path, logged):
    data = unlabelled(tmp_path, "train", [None] * 3)
    unlabelled(tmp_path, "val", [None])
    assert logged(data) == [
        f"{count} of {count} images in {data}/{split} have no label: {count} without one (such as "
        "00000.jpg). job.train does not need labels, k-NN and job.linear do"
        for split, count in (("train", 3), ("val", 1))
    ]
    images = scan(str(data), "train")
    assert (images.classes, images.labels.tolist(), images.labelled) == ([], [-1] * 3, 0)
    assert [images.content(number) for number in range(3)] == [b"image 0", b"image 1", b"image 2"]
    assert sorted(images.order(0, 0, 3)) == [0, 1, 2]
    with pytest.raises(
        RunError,
        match=f"no image in {data}/train has a label; expected labels for k-NN and job.linear",
    ):
        scan_validation(str(data), images)


def test_index_counts_missing_labels(tmp_path, logged):
    data = unlabelled(tmp_path, "train", [1, None, 0, "cat", None])
    unlabelled(tmp_path, "val", [1])
    [line] = logged(data)
    assert line.startswith(
        f"3 of 5 images in {data}/train have no label: 2 without one (such as 00001.jpg), "
        "1 with one that is no"
    )
    images = scan(str(data), "train")
    assert (images.classes, images.labels.tolist(), images.labelled) == (
        ["0", "1"],
        [1, -1, 0, -1, -1],
        2,
    )
    assert scan_validation(str(data), images).labels.tolist() == [1]


def test_index_names_unlabelled_validation(tmp_path):
    data = unlabelled(tmp_path, "train", [1, 0])
    unlabelled(tmp_path, "val", [None])
    index(str(data), Log(speaks=False))
    with pytest.raises(RunError, match=f"no image in {data}/val has a label"):
        scan_validation(str(data), scan(str(data), "train"))


def test_index_logs_files_left_out(tmp_path, logged):
    data = unlabelled(tmp_path, "train", [0, 1, 0], key="scan_{:03d}_v1.5")
    for name in ("._0.tar", "1.tar.gz", "list.csv", ".DS_Store"):
        (data / "train" / name).write_bytes(b"x")
    with webdataset.TarWriter(f"{data}/train/2.TAR") as writer:
        writer.write({"__key__": "a", "jpg": b"x", "cls": 0, "txt": "a cat"})
        writer.write({"__key__": "b", "cr3": b"x", "cls": 0})
    assert logged(data) == [
        f"left out 7 of 11 files in {data}/train: 2 hidden or of the system (such as .DS_Store), "
        "2 in no tar file (such as 1.tar.gz), 1 .txt (such as a.txt), 1 .cls (such as b.cls), "
        "1 .cr3 (such as b.cr3)"
    ]
    images = scan(str(data), "train")
    assert [images.names[number] for number in range(4)] == [
        *(f"scan_00{number}_v1.5.jpg" for number in range(3)),
        "a.jpg",
    ]
    assert images.labels.tolist() == [0, 1, 0, 0]


def test_index_reports_missing_shards(shards):
    data, _ = shards
    index(str(data), Log(speaks=False))
    assert scan(str(data), "train").left_out == ""
    shutil.copy(data / "val" / "val-0000.tar", data / "train" / "train-0003.tar")
    (data / "train" / ".nfs0001").touch()
    line = scan(str(data), "train").left_out
    assert (
        line.startswith(f"left out 2 of 5 files in {data}/train: ")
        and "1 missing in the index (such as train-0003.tar)" in line
    )


def test_index_names_the_expected_folders(tmp_path):
    assert f"expected {tmp_path}/none/train/*.tar" in refused(tmp_path / "none")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar.gz").write_bytes(b"x")
    assert "not compressed" in refused(tmp_path)
    assert "Move or link" not in refused(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"x")
    assert f"Move or link the tar files of {tmp_path}" in refused(tmp_path)


def test_index_ignores_folders_named_tar(shards):
    data, _ = shards
    (data / "train" / "more.tar").mkdir()
    assert len(index(str(data), Log(speaks=False))["train"]) == 3


def test_index_refuses_shards_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    with webdataset.TarWriter(str(tmp_path / "train" / "0.tar")) as writer:
        writer.write({"__key__": "a", "txt": "text", "cls": 1})
    assert f"no images in the shards of {tmp_path}/train" in refused(tmp_path)
    assert os.listdir(tmp_path / "train") == ["0.tar"]


def test_index_refuses_a_damaged_shard(shards):
    data, _ = shards
    os.truncate(data / "val" / "val-0000.tar", 3000)
    assert f"{data}/val/val-0000.tar" in refused(data)
    assert not list(data.glob("*/index.npz*"))


def test_index_of_a_folder_without_train(tmp_path):
    for folder, count in (("", 3), ("val", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        images = [(number, f"c/{number}.png", 0, b"image") for number in range(count)]
        write_shard(str(tmp_path / folder / "0.tar"), images)
    index(str(tmp_path), Log(speaks=False))
    train = scan(str(tmp_path), "train")
    assert (len(train), train.root, train.left_out) == (3, str(tmp_path), "")
    assert len(scan_validation(str(tmp_path), train)) == 2
