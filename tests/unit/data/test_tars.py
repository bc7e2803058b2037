"""Tar shards: writing, and reading shards of webdataset and tar."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from job.data.selection import Selection
from job.data.tars import Member, read_shard, write_shard
from job.errors import RunError
from pictures import photo


def picture(seed, form="JPEG"):
    """Return an image's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(photo(seed, 12, 16)).save(buffer, form)
    return buffer.getvalue()


IMAGES = [
    (number, f"c{number % 3}/{number}.jpg", number % 3, picture(number)) for number in range(5)
]


def members_of(path, shard):
    """Return (name, label, bytes) of each image, as in an index."""
    content = path.read_bytes()
    return [
        (name, label, content[offset : offset + size])
        for name, label, offset, size in zip(
            shard.names, shard.labels, shard.offsets, shard.sizes, strict=True
        )
    ]


def refused(path):
    with pytest.raises(RunError) as caught:
        read_shard(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def tar_of(path, **files):
    """Write a tar file of these members. Two underscores in a name become a dot."""
    return write_tar(path, {name.replace("__", "."): content for name, content in files.items()})


def write_tar(path, files):
    """Write a tar file of members {name: content}."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_write_shard_is_read_back(tmp_path):
    path = tmp_path / "0.tar"
    write_shard(str(path), IMAGES)
    shard = read_shard(str(path))
    assert (shard.name, shard.size) == ("0.tar", path.stat().st_size)
    assert members_of(path, shard) == [image[1:] for image in IMAGES]


def test_write_shard_keeps_any_name(tmp_path):
    names = [
        "größe/é.png",
        "caf\udce9/\udcff\udcfe.png",
        "new\nline/1.png",
        f"{'a' * 200}/{'b' * 200}.png",
        "c/two.dots.PNG",
    ]
    write_shard(str(tmp_path / "0.tar"), [(key, name, key, b"x") for key, name in enumerate(names)])
    assert read_shard(str(tmp_path / "0.tar")).names == names


def test_write_shard_failure_leaves_no_file(tmp_path):
    def broken():
        yield IMAGES[0]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_shard(str(tmp_path / "0.tar"), broken())
    assert not (tmp_path / "0.tar").exists()


def test_write_shard_is_read_by_webdataset(tmp_path):
    write_shard(str(tmp_path / "0.tar"), IMAGES)
    samples = list(
        webdataset.WebDataset(
            str(tmp_path / "0.tar"), shardshuffle=False, empty_check=False
        ).decode("rgb8")
    )
    assert [sample["__key__"] for sample in samples] == [f"{key:09d}" for key, *_ in IMAGES]
    assert [(sample["json"]["path"], sample["cls"]) for sample in samples] == [
        (name, label) for _, name, label, _ in IMAGES
    ]
    for sample, (_, _, _, content) in zip(samples, IMAGES, strict=True):
        assert np.array_equal(sample["jpg"], np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("label", ["cls", "json"])
def test_read_shard_of_webdataset(tmp_path, label):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, _, number, content in IMAGES:
            writer.write(
                {"__key__": f"sample{key}", "jpg": content}
                | {label: number if label == "cls" else {"label": number}}
            )
    shard = read_shard(str(tmp_path / "0.tar"))
    assert members_of(tmp_path / "0.tar", shard) == [
        (f"sample{k}.jpg", label, content) for k, _, label, content in IMAGES
    ]


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_read_shard_of_tar(tmp_path, form):
    """It has folders, long names if the format has them, and members that are not images."""
    long = "l" * (40 if form == "v7" else 90)
    (tmp_path / "in" / long).mkdir(parents=True)
    for key, _, label, content in IMAGES:
        (tmp_path / "in" / long / f"{key}.jpg").write_bytes(content)
        (tmp_path / "in" / long / f"{key}.cls").write_text(f"{label}\n")
    (tmp_path / "in" / "README.md").write_text("no image")
    subprocess.run(
        [
            "tar",
            "-C",
            tmp_path / "in",
            f"--format={form}",
            "--sort=name",
            "-cf",
            tmp_path / "0.tar",
            ".",
        ],
        check=True,
    )
    shard = read_shard(str(tmp_path / "0.tar"))
    assert members_of(tmp_path / "0.tar", shard) == [
        (f"./{long}/{k}.jpg", label, content) for k, _, label, content in IMAGES
    ]


HEADERS = {
    "short": {"name": "n01/1.JPEG", "size": 8**7 + 1},
    "empty": {"name": "1.cls"},
    "bytes": {"name": "caf\udce9.png", "size": 5},
    "longest": {"name": "n" * 100},
    "prefix": {"name": f"{'a' * 90}/{'b' * 90}.png", "size": 9},
    "large": {"name": "1.png", "size": 8**11 + 7},
    "v7": {"name": "1.png", "type": tarfile.AREGTYPE},
    "folder": {"name": "n01", "type": tarfile.DIRTYPE},
    "link": {"name": "1.png", "type": tarfile.LNKTYPE, "linkname": "2.png"},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_member_equals_tarfile_s(kind):
    written = tarfile.TarInfo()
    for attribute, value in HEADERS[kind].items():
        setattr(written, attribute, value)
    form = tarfile.USTAR_FORMAT if kind == "prefix" else tarfile.GNU_FORMAT
    header = written.tobuf(form, "utf-8", "surrogateescape")
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:", tarinfo=Member) as tar:
        read, end = tar.firstmember, tar.offset
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
        expected, expected_end = tar.firstmember, tar.offset
    for name in ("name", "size", "type", "linkname", "offset", "offset_data"):
        assert getattr(read, name) == getattr(expected, name)
    assert end == expected_end
    damaged = header[:3] + bytes([header[3] ^ 1]) + header[4:]
    with pytest.raises(tarfile.ReadError):
        tarfile.open(fileobj=io.BytesIO(damaged), mode="r:", tarinfo=Member)


SIZES = {
    "back to itself": b"-0000001000\0",
    "back to the start": b"-0000002000\0",
    "minus one": b"-0000000001\0",
    "minus 512 in binary": b"\xff" * 10 + b"\xfe\0",
    "beyond all files": b"\x80\0\0\0\x3f" + b"\xff" * 7,
    "beyond 64 bits": b"\x80" + b"\xff" * 11,
}


@pytest.mark.parametrize("type", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("kind", SIZES)
def test_read_shard_refuses_an_impossible_size(tmp_path, kind, type):
    """Some releases of tarfile read the same members without end, or raise other errors."""
    path = tar_of(tmp_path / "0.tar", a__png=b"A", b__png=b"B")
    header = tarfile.TarInfo("b.png").tobuf()
    damaged = bytearray(header[:124] + SIZES[kind] + b" " * 20 + type + header[157:])
    damaged[148:156] = b"%06o\0 " % sum(damaged[:512])
    content = path.read_bytes()
    path.write_bytes(content[:1024] + damaged + content[1536:])
    assert "0.tar: incomplete or " in refused(path)


def test_read_shard_in_any_order_and_case(tmp_path):
    path = tar_of(
        tmp_path / "0.tar",
        b__cls=b"7",
        a__PNG=b"A",
        notes=b"",
        b__jpg=b"B",
        a__txt=b"cat",
        a__CLS=b"0",
        _json=b"{}",
    )
    assert members_of(path, read_shard(str(path))) == [("b.jpg", 7, b"B"), ("a.PNG", 0, b"A")]


def test_read_shard_without_images_is_empty(tmp_path):
    assert read_shard(str(tar_of(tmp_path / "0.tar", a__txt=b"x", b__cls=b"1"))).names == []
    assert read_shard(str(tar_of(tmp_path / "1.tar"))).names == []


NO_LABELS = {
    "nothing": ({}, "without one"),
    "negative": ({"a__cls": b"-1"}, "a.jpg: b'-1'"),
    "a word": ({"a__cls": b"cat"}, "a.jpg: b'cat'"),
    "a name": ({"a__json": b'{"label": "cat"}'}, "a.jpg: 'cat'"),
    "several": ({"a__json": b'{"label": [1, 2]}'}, "a.jpg: [1, 2]"),
    "a fraction": ({"a__json": b'{"label": 1.5}'}, "a.jpg: 1.5"),
    "infinite": ({"a__json": b'{"label": Infinity}'}, "a.jpg: inf"),
    "too large to be one": ({"a__cls": b"123456789012345678"}, "no class number"),
    "a list": ({"a__json": b"[1]"}, "without one"),
    "json without it": ({"a__json": b'{"path": "x.jpg"}'}, "without one"),
    "broken json": ({"a__json": b'{"label": '}, "without one"),
    "deep json": ({"a__json": b"[" * 100_000}, "without one"),
    "another's": ({"b__cls": b"1"}, "without one"),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_read_shard_counts_missing_labels(tmp_path, kind):
    files, expected = NO_LABELS[kind]
    selection = Selection()
    shard = read_shard(str(tar_of(tmp_path / "0.tar", a__jpg=b"x", **files)), selection)
    assert (shard.labels, selection.taken, selection.unlabelled.total) == ([-1], 1, 1)
    assert expected in str(selection.unlabelled)


def test_read_shard_replaces_impossible_names(tmp_path):
    path = tar_of(
        tmp_path / "0.tar", a__jpg=b"x", a__cls=b"1", a__json=b'{"path": "\\ud800/x.png"}'
    )
    assert read_shard(str(path)).names == ["a.jpg"]


# Members of a tar file, and its images: =3 is the content of a .cls, and an image's label.
MEMBERS = {
    "dots": (
        "scan_001_v1.5.jpg scan_002_v1.5.JPG x.y.z.png",
        "scan_001_v1.5.jpg scan_002_v1.5.JPG x.y.z.png",
    ),
    "versions": ("a.1.jpg a.2.jpg", "a.1.jpg a.2.jpg"),
    "labels of their own": ("a.1.jpg a.1.cls=3 a.2.jpg a.2.cls=4", "a.1.jpg=3 a.2.jpg=4"),
    "the label of the key": ("a.v1.5.jpg a.cls=3", "a.v1.5.jpg=3"),
    "the nearest label": ("a.cls=1 a.v1.cls=2 a.v1.5.jpg a.v2.jpg", "a.v1.5.jpg=2 a.v2.jpg=1"),
    "left and right": ("k.left.jpg k.right.jpg k.cls=3", "k.left.jpg=3 k.right.jpg=3"),
    "image and mask": ("k.cls=3 k.depth.png k.jpg k.seg.png", "k.jpg=3"),
    "image and mask of two kinds": ("k.cls=3 k.jpg k.png", "k.jpg=3"),
    "folders with dots": (
        "./v1.0/a.jpg ./v1.0/a.cls=3 v2.0/b.jpg v2.0.cls=4",
        "./v1.0/a.jpg=3 v2.0/b.jpg",
    ),
    "of a Mac": (
        "c/a.jpg c/._a.jpg __MACOSX/c/._a.jpg __MACOSX/c/a.jpg .DS_Store ./c/.x/b.jpg",
        "c/a.jpg",
    ),
}
LEFT_OUT = {
    "image and mask": "2 belonging to the image of the same label (such as k.depth.png)",
    "image and mask of two kinds": "1 belonging to the image of the same label (such as k.png)",
    "folders with dots": "1 .cls (such as v2.0.cls)",
    "of a Mac": "5 hidden or of the system (such as c/._a.jpg)",
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_read_shard_counts_each_file(tmp_path, kind):
    given, expected = (
        {name: label for name, _, label in (word.partition("=") for word in members.split())}
        for members in MEMBERS[kind]
    )
    files = {name: label or name for name, label in given.items()}
    path = write_tar(
        tmp_path / "0.tar", {name: content.encode() for name, content in files.items()}
    )
    selection = Selection()
    actual = members_of(path, read_shard(str(path), selection))
    assert actual == [(name, int(label or -1), name.encode()) for name, label in expected.items()]
    assert selection.taken == len(expected) and str(selection.left_out) == LEFT_OUT.get(kind, "")


def test_read_shard_follows_links(tmp_path):
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "a" / "1.jpg").write_bytes(b"image")
    (folder / "a" / "1.cls").write_text("3")
    (folder / "b" / "2.jpg").hardlink_to(folder / "a" / "1.jpg")
    (folder / "b" / "3.jpg").symlink_to("../a/1.jpg")
    (folder / "b" / "4.jpg").symlink_to("3.jpg")
    (folder / "b" / "5.jpg").symlink_to("5.jpg")
    (folder / "b" / "6.jpg").symlink_to("/elsewhere/6.jpg")
    for number in (2, 3, 4):
        (folder / "b" / f"{number}.cls").hardlink_to(folder / "a" / "1.cls")
    path = tmp_path / "0.tar"
    subprocess.run(["tar", "-C", folder, "--sort=name", "-cf", path, "."], check=True)
    selection = Selection()
    actual = members_of(path, read_shard(str(path), selection))
    assert actual == [(f"./{name}.jpg", 3, b"image") for name in ("a/1", "b/2", "b/3", "b/4")]
    assert str(selection.left_out) == "2 that lead to no file of the tar (such as ./b/5.jpg)"


def test_read_shard_leaves_out_sparse_members(tmp_path):
    """Their bytes are in several pieces."""
    with open(tmp_path / "a.bmp", "wb") as file:
        file.truncate(2**20)
        file.write(b"x")
    (tmp_path / "b.bmp").write_bytes(b"whole")
    subprocess.run(
        ["tar", "-C", tmp_path, "-S", "-cf", tmp_path / "0.tar", "a.bmp", "b.bmp"], check=True
    )
    selection = Selection()
    assert read_shard(str(tmp_path / "0.tar"), selection).names == ["b.bmp"]
    assert str(selection.left_out) == "1 stored sparse (such as a.bmp)"


def test_read_shard_finds_labels_in_any_json(tmp_path):
    for number, meta in enumerate(
        [b"[1]", b"null", b'{"label": 9}', json.dumps({"path": None}).encode()]
    ):
        shard = read_shard(
            str(tar_of(tmp_path / f"{number}.tar", a__jpg=b"x", a__cls=b"4", a__json=meta))
        )
        assert (shard.names, shard.labels) == (["a.jpg"], [4])


@pytest.mark.parametrize("form", ["gz", "xz", "bz2"])
def test_read_shard_refuses_compression(tmp_path, form):
    with tarfile.open(tmp_path / "0.tar", f"w:{form}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "compressed tar file" in refused(tmp_path / "0.tar")


def test_read_shard_refuses_any_cut(tmp_path):
    write_shard(str(tmp_path / "0.tar"), IMAGES[:2])
    content = (tmp_path / "0.tar").read_bytes()
    last = content.rindex(b"}") // tarfile.BLOCKSIZE  # block of the last member
    end = (last + 1) * tarfile.BLOCKSIZE
    cuts = [0, 1, 511, 512, 513, *range(0, end, tarfile.BLOCKSIZE), end - 1, end, end + 511]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        assert "Copy it again" in refused(tmp_path / "cut.tar"), cut
    (tmp_path / "cut.tar").write_bytes(content[: end + tarfile.BLOCKSIZE])
    assert len(read_shard(str(tmp_path / "cut.tar")).names) == 2


def test_read_shard_refuses_a_damaged_header(tmp_path):
    write_shard(str(tmp_path / "0.tar"), IMAGES[:3])
    content = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        headers = [member.offset for member in tar]
    random = np.random.default_rng(0)
    for header in headers:
        for offset in random.integers(0, 500, 10):
            damaged = bytearray(content)
            damaged[header + offset] ^= 1 << random.integers(0, 8)
            (tmp_path / "0.tar").write_bytes(damaged)
            assert "Copy it again" in refused(tmp_path / "0.tar"), (header, offset)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"this is no tar file\n" * 100, b"<html>"])
def test_read_shard_refuses_other_files(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    assert "Copy it again" in refused(tmp_path / "0.tar")
