"""Folders of data: pictures of all formats, invalid files, links, permissions and names."""

import io
import json
import os
import re
import shutil
import stat
import struct
import tarfile
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cases import LINEAR, SMALL, Case, check, fill
from job.data.folders import scan
from job.data.index import index
from job.metrics.log import Log
from runs import all_records
from short import short

# pytest replaces the program's filters.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

RED, GREEN, WHITE, PINK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (255, 127, 127)


def encoded(image, form="PNG", **options):
    """Return an image's bytes in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(mode, colour, size=(40, 36)):
    """Return an image of one colour."""
    return Image.new(mode, size, colour)


def palette(**options):
    image = plain("P", 0)
    image.putpalette([*RED, *GREEN])
    return encoded(image, **options)


def animated(form):
    """Return an animation of three pictures. The first is red."""
    first, *others = (plain("RGB", colour) for colour in (RED, GREEN, WHITE))
    return encoded(
        first,
        form,
        save_all=True,
        append_images=others,
        **({"lossless": True} if form == "WEBP" else {}),
    )


def deep(channels):
    """Return a PNG with 16 bits per channel: red, or grey if there is one channel."""
    pixels = np.full((36, 40, channels), 0x80FF, dtype=np.uint16)
    if channels > 1:
        pixels[:] = [0, 0, 65535, 65535][:channels]  # blue, green, red
    return cv2.imencode(".png", pixels)[1].tobytes()


def png(width, height, row=None, rows=0):
    """Return the bytes of an RGBA PNG of any size. It contains `rows` copies of `row`."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer = zlib.compressobj(1)
    content = b"".join(packer.compress(b"\0" + row) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


# File name: its bytes, and the colour after decoding
PICTURES = {
    "grey.png": (lambda: encoded(plain("L", 100)), (100, 100, 100)),
    "one bit.png": (lambda: encoded(plain("1", 1)), WHITE),
    "16 bits grey.png": (lambda: deep(1), (128, 128, 128)),
    "16 bits.png": (lambda: deep(3), RED),
    "16 bits with alpha.png": (lambda: deep(4), RED),
    "16 bits.pgm": (lambda: b"P5 40 36 65535\n" + b"\x80\xff" * 1440, (128, 128, 128)),
    "16 bits.tif": (
        lambda: encoded(Image.fromarray(np.full((36, 40), 0x80FF, np.uint16)), "TIFF"),
        (128, 128, 128),
    ),
    "inks.jpg": (lambda: encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "inks.tif": (lambda: encoded(plain("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "palette.png": (palette, RED),
    "palette with a hole.png": (lambda: palette(transparency=0), WHITE),
    "palette half through.png": (lambda: palette(transparency=b"\x80"), PINK),
    "palette.gif": (lambda: palette(form="GIF"), RED),
    "half through.png": (lambda: encoded(plain("RGBA", (255, 0, 0, 128))), PINK),
    "all through.png": (lambda: encoded(plain("RGBA", (255, 0, 0, 0))), WHITE),
    "grey with alpha.png": (lambda: encoded(plain("LA", (0, 0))), WHITE),
    "animated.gif": (lambda: animated("GIF"), RED),
    "animated.webp": (lambda: animated("WEBP"), RED),
    "animated.png": (lambda: animated("PNG"), RED),
    "3x2.png": (lambda: encoded(plain("RGB", RED, (3, 2))), RED),
    "one pixel.png": (lambda: encoded(plain("RGB", RED, (1, 1))), RED),
    "a strip.png": (lambda: encoded(plain("RGB", RED, (3000, 1))), RED),
    "a png.jpg": (lambda: encoded(plain("RGB", RED)), RED),
    "a jpeg.png": (lambda: encoded(plain("RGB", RED), "JPEG", quality=100), RED),
    "A GIF.TIFF": (lambda: animated("GIF"), RED),
    "25 megapixels.jpg": (
        lambda: encoded(plain("RGB", RED, (5000, 5000)), "JPEG", quality=100),
        RED,
    ),
    "168 megapixels.png": (lambda: png(10500, 16000, bytes([255, 0, 0, 128]) * 10500, 16000), PINK),
    "größe \udcff\n.png": (lambda: encoded(plain("RGB", RED)), RED),
}


def noise(form="PNG"):
    return encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        form,
    )


def written(content):
    """Return a function that writes bytes to a path."""

    def write(path):
        with open(path, "wb") as file:
            file.write(content())

    return write


def long_file(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


# File name: the function that makes it, and a part of the error
BROKEN = {
    "empty.png": (written(lambda: b""), "no image"),
    "cut.png": (written(lambda: noise()[:3000]), "truncated"),
    "cut.jpg": (written(lambda: noise("JPEG")[:1000]), "truncated"),
    "cut.gif": (written(lambda: noise("GIF")[:1000]), ""),
    "cut.webp": (written(lambda: noise("WEBP")[:1000]), ""),
    "only a header.png": (written(lambda: noise()[:20]), ""),
    "damaged.png": (written(lambda: noise()[:2000] + b"\xff" * 99 + noise()[2099:]), ""),
    "text.png": (written(lambda: b"no picture"), "no image of a known format"),
    "web page.jpg": (
        written(lambda: b"<!DOCTYPE html><html></html>"),
        "no image of a known format",
    ),
    "program.png": (
        written(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"),
        "no image of a known format",
    ),
    "623 megapixels.png": (written(lambda: png(20990, 29700)), "623403000 pixels"),
    "no pixels.png": (written(lambda: png(0, 5)), ""),
    "a terabyte.png": (long_file, "1099511627776 bytes; expected at most"),
    "pipe.png": (os.mkfifo, "not a regular file"),
    "socket.png": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), ""),
    "device.png": (lambda path: os.symlink("/dev/zero", path), "not a regular file"),
    "sch\udcf6n\n.png": (written(lambda: b"no picture"), "sch\\udcf6n\\n.png"),
}


def pack_with_labels(good, folder, labelled):
    """Write the images of each split into a tar file, under names with dots, and the index.

    Only the first `labelled` images of a split have labels.
    """
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for number, path in enumerate(sorted((good / split).glob("*/*.png"))):
                tar.add(path, f"scan_{number}_v1.5.png")
                if number < labelled:
                    label = tarfile.TarInfo(f"scan_{number}_v1.5.cls")
                    label.size = 1
                    tar.addfile(label, io.BytesIO(b"%d" % (number % 2)))
    index(str(folder), Log(speaks=False))


def make_trees(folder, good):
    """Make folders of data with special layouts in `folder`."""
    for name in (
        "linked",
        "round",
        "class-loops",
        "class-nowhere",
        "forbidden",
        "forbidden-file",
        "val-differs",
        "no-val",
    ):
        shutil.copytree(good, folder / name)
    shutil.rmtree(folder / "linked" / "train" / "a")
    (folder / "linked" / "train" / "a").symlink_to(good / "train" / "a")
    (folder / "linked" / "train" / "b" / "below").symlink_to(good / "train" / "a")
    (folder / "round" / "train" / "a" / "up").symlink_to("../..")
    (folder / "round" / "train" / "a" / "over").symlink_to("../b")
    (folder / "round" / "train" / "b" / "over").symlink_to("../a")
    (folder / "round" / "train" / "b" / "self").symlink_to("self")
    (folder / "class-loops" / "train" / "c").symlink_to(".")
    (folder / "class-nowhere" / "train" / "c").symlink_to("/mnt/nowhere")
    (folder / "forbidden" / "train" / "a" / "below").mkdir(0)
    (folder / "forbidden-file" / "train" / "a" / "no one's.png").touch(0)
    (folder / "val-differs" / "val" / "b").rename(folder / "val-differs" / "val" / "c")
    shutil.rmtree(folder / "no-val" / "val")
    fill(folder / "loose" / "train", 4)
    (folder / "empty" / "train" / "a").mkdir(parents=True)
    (folder / "file" / "train").parent.mkdir()
    (folder / "file" / "train").touch()
    pack_with_labels(good, folder / "no-labels", 0)
    pack_with_labels(good, folder / "few-labels", 3)
    shutil.copytree(good, folder / "leftovers")
    for path in (
        "train/.ipynb_checkpoints/1.png",
        "train/a/.ipynb_checkpoints/1.png",
        "train/a/._good1.png",
        "train/b/1.cr3",
    ):
        (folder / "leftovers" / path).parent.mkdir(exist_ok=True)
        shutil.copy(good / "train" / "a" / "good1.png", folder / "leftovers" / path)
    (folder / "all-bad" / "train" / "a").mkdir(parents=True)
    for number in range(8):
        (folder / "all-bad" / "train" / "a" / f"{number}.png").touch()


@pytest.fixture(scope="module")
def values(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_trees(folder, good)
    (folder / "pictures" / "train" / "all").mkdir(parents=True)
    for name, (content, _) in PICTURES.items():
        written(content)(folder / "pictures" / "train" / "all" / name)
    for number, (name, (make, _)) in enumerate(BROKEN.items()):
        shutil.copytree(good, folder / f"broken{number}")
        make(folder / f"broken{number}" / "train" / "a" / name)
    return {"good": good, "folder": folder}


def train(name, data, *parts, options="", program="job.train", **more):
    """Return a case of a data folder."""
    small = SMALL if program == "job.train" else LINEAR
    return Case(name, [f"{{folder}}/{data}", *small, *options.split()], parts, program, **more)


CASES = [
    train(
        "a class that links back", "class-loops", "train/c", "leads nowhere or back", "remove it"
    ),
    train(
        "a class with a dangling link",
        "class-nowhere",
        "train/c",
        "/mnt/nowhere",
        "leads nowhere or back",
    ),
    train(
        "an unreadable folder",
        "forbidden",
        "train/a/below",
        "Permission denied",
        unprivileged=True,
    ),
    train("images in no class", "loose"),
    train("no images", "empty", "empty/train", "<class>/*"),
    train("a file for a folder", "file", "file", "train/<class>/*"),
    train("other classes", "val-differs", "train", "val", "b, c", program="job.linear"),
    train("other classes for k-NN", "val-differs", "train", "val", "b, c", options="--knn-every 1"),
    train("no validation images", "no-val", "val or valid", program="job.linear"),
    train(
        "shards without labels for k-NN",
        "no-labels",
        "no-labels/train has a label",
        "k-NN",
        options="--knn-every 1",
    ),
    train(
        "shards without labels for a classifier",
        "no-labels",
        "no-labels/train has a label",
        program="job.linear",
    ),
    train(
        "shards with few labels",
        "few-labels",
        "5 of 8 images in",
        "few-labels/train have no label",
        program="job.linear",
    ),
    train("shards with few labels for k-NN", "few-labels", program="job.linear", options="--knn"),
    train("no validation images for k-NN", "no-val", "val or valid", options="--knn-every 1"),
]
# Packing must end with the name of a file that it cannot copy.
UNPACKED = [
    Case(f"packing {name}", [f"{{folder}}/broken{number}", "OUT"], (name, part), "job.pack")
    for number, (name, (_, part)) in enumerate(BROKEN.items())
    if part in ("not a regular file", "1099511627776 bytes; expected at most")
]
# Folder: its number of images
LINKS = {"linked": 4 + 4 + 4, "round": 8 + 8}
LINKED = [train(name, name) for name in LINKS]
UNLABELLED = train("shards without labels", "no-labels")
LEFTOVERS = train("leftovers", "leftovers", options="--knn-every 1 --knn-k 3")
# A batch of 9 reads all images of a folder.
WORK = [
    train(name, f"broken{n}", options="--batch-size 9", unprivileged=True)
    for n, name in enumerate(BROKEN)
]
FAIL = [
    Case(f"{case.name} at the limit", [*case.argv, "--max-bad-images", "0"], unprivileged=True)
    for case in WORK
]
PICTURE_RUN = Case("pictures", ["{folder}/pictures", *SMALL, "--batch-size", str(len(PICTURES))])
FORBIDDEN = train(
    "an unreadable file", "forbidden-file", options="--batch-size 9", unprivileged=True
)
ALL_BAD = train("only bad images", "all-bad")


SHORT = ["a class that links back", "an unreadable folder", "no images", "other classes"]


@pytest.mark.parametrize("case", short(CASES, *SHORT), ids=lambda case: case.name)
def test_folder(case, outcomes, values):
    check(case, outcomes, values)


@pytest.mark.parametrize("case", short(UNPACKED, "packing pipe.png"), ids=lambda case: case.name)
def test_pack_names_the_file(case, outcomes, values):
    outcome, folder = outcomes[case.name]
    assert outcome["code"] == 1 and outcome["stderr"].count("\n") == 1, outcome
    for part in (*case.parts, "Complete shards are kept"):
        assert part in outcome["stderr"], outcome
    assert os.listdir(folder) == ["OUT.part"]


@pytest.mark.parametrize("case", short(LINKED, "round"), ids=lambda case: case.name)
def test_links_are_followed_once(case, outcomes):
    outcome, _ = outcomes[case.name]
    outcome.worked()
    assert f"{LINKS[case.name]} images, " in outcome["stdout"]


@pytest.mark.short
@pytest.mark.parametrize("case", [UNLABELLED], ids=lambda case: case.name)
def test_shards_without_labels_train(case, outcomes):
    outcome, _ = outcomes[case.name]
    outcome.worked()
    assert "8 images, 2 steps an epoch" in outcome["stdout"]


@pytest.mark.short
@pytest.mark.parametrize("case", [LEFTOVERS], ids=lambda case: case.name)
def test_leftovers_are_skipped_and_logged(case, outcomes, values):
    outcome, folder = outcomes[case.name]
    outcome.worked()
    line = f"left out 4 of 12 files in {values['folder']}/leftovers/train: "
    line += "3 hidden or of the system (such as .ipynb_checkpoints)"
    assert outcome["stdout"].count(f"{line}, 1 .cr3 (such as b/1.cr3)") == 1
    log = (folder / "runs" / "resnet18" / "log.txt").read_text()
    assert line in log and "8 images, 2 steps an epoch" in log
    knn = r"k-NN accuracy on 4 images of \S+/leftovers/val: top-1 [0-9.]+ %, k = 3"
    assert re.search(knn + r" among 8 images of \S+/train", log)
    records = (folder / "runs" / "resnet18" / "metrics.jsonl").read_text().splitlines()
    [record] = [record for record in map(json.loads, records) if "knn" in record]
    assert (record["knn_k"], record["knn_images"]) == (3, 4)


@pytest.mark.parametrize("case", [PICTURE_RUN], ids=lambda case: case.name)
def test_pictures_train_in_bounded_memory(case, outcomes):
    outcome, _ = outcomes[case.name]
    outcome.worked()
    assert "cannot decode" not in outcome["stdout"]
    assert outcome["peak"] < 1500  # MB: PIL's 4 bytes per pixel are 672, Python and torch 570


@pytest.mark.parametrize("name", short(PICTURES, "16 bits.png", "inks.jpg", "animated.gif"))
def test_picture_colour(name, values):
    images = scan(str(values["folder"] / "pictures"), "train")
    [index] = [index for index in range(len(images)) if images.names[index] == f"all/{name}"]
    pixels, _, bad = images.read(index)
    assert not bad
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.size <= 3 * 2**24
    assert np.abs(pixels.astype(int) - PICTURES[name][1]).max() <= 2


@pytest.mark.parametrize("case", short(WORK, "cut.jpg", "web page.jpg"), ids=lambda case: case.name)
def test_bad_file_is_logged_and_skipped(case, outcomes):
    outcome, folder = outcomes[case.name]
    outcome.worked()
    lines = [line for line in outcome["stdout"].splitlines() if "cannot decode" in line]
    assert len(lines) == 1, outcome
    assert BROKEN[case.name][1] in lines[0] and printable(case.name) in lines[0]
    assert (folder / "runs" / "resnet18" / "last.pth.tar").is_file()


@pytest.mark.parametrize("case", short(FAIL, "cut.png at the limit"), ids=lambda case: case.name)
def test_bad_file_beyond_the_limit(case, outcomes):
    outcome, folder = outcomes[case.name]
    outcome.refused(
        "1 of 9 images cannot be decoded",
        "--max-bad-images is 0",
        printable(case.name.removesuffix(" at the limit")),
    )
    # The log and the options stay, but no checkpoint.
    run = folder / "runs" / "resnet18"
    assert sorted(os.listdir(run)) == ["config.yaml", "log.txt", "metrics.jsonl"]
    end = all_records(run)[-1]
    assert (end["kind"], end["how"], end["code"]) == ("end", "error", 2)
    assert "--max-bad-images is 0" in end["text"]


@pytest.mark.parametrize("case", [FORBIDDEN], ids=lambda case: case.name)
def test_unreadable_file_ends_the_run(case, outcomes, values):
    outcome, _ = outcomes[case.name]
    assert outcome["code"] == 1 and "cannot decode" not in outcome["stdout"], outcome
    *warnings, error = outcome["stderr"].splitlines()
    path = f"{values['folder']}/forbidden-file/train/a/no one's.png"
    text = f"cannot read {path}: Permission denied"
    assert error == f"error: {text}, tried 5 times in 15 s. Check its file system and permissions"
    assert warnings == [f"warning: {text}; next try in {pause} s" for pause in (1, 2, 4, 8)]


@pytest.mark.short
@pytest.mark.parametrize("case", [ALL_BAD], ids=lambda case: case.name)
def test_only_bad_images_end_the_run(case, outcomes):
    outcomes[case.name][0].refused("8 of 8 images cannot be decoded", "all-bad/train/a/0.png")


def printable(name):
    """Return a file's name as a log line shows it."""
    return name.replace("\n", "\\n").encode(errors="backslashreplace").decode()
