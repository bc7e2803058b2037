"""Decoding of images: formats, metadata, damage, short memory, replacement."""

import contextlib
import io
import math
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from job.data import images as module
from job.data.folders import scan
from job.data.images import Names, read_image, readable_endings
from job.errors import RunError
from job import files
from pictures import noise, photo


def encoded(image, form="PNG", **options):
    """Return an image's bytes in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


NAMES = [
    "a/1.png",
    "",
    "größe/é.jpg",
    "日本/猫.png",
    os.fsdecode(b"caf\xe9/\xff.png"),
    "new\nline/1.png",
]


@pytest.mark.parametrize("names", [[], ["a"], [""], NAMES])
def test_names_keep_order_and_bytes(names):
    actual = Names.of(names)
    assert len(actual) == len(names)
    assert list(actual) == [actual[index] for index in range(len(names))] == names
    assert list(pickle.loads(pickle.dumps(actual))) == names


def test_readable_endings_exclude_write_only_formats():
    endings = readable_endings()
    assert {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"} <= endings
    assert ".pdf" not in endings  # only written


def test_read_ignores_exif_orientation():
    """PIL also ignores the camera's orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(photo(5, 40, 60)), "JPEG", exif=exif)
    assert read_image(content).shape == (40, 60, 3)


@pytest.mark.parametrize("kept", [0, 2, 100, 0.5, 0.9])
def test_cut_jpeg_has_a_constant_error(kept):
    full = encoded(Image.fromarray(noise(0)), "JPEG")
    content = full[: int(kept * len(full)) if isinstance(kept, float) else kept]
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            read_image(content)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "/" not in messages.pop()  # no path of a source file


def chunk(kind, content, checksum=None):
    """Return a chunk of a PNG, with the given checksum or the right one."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def compressed(size):
    """Return `size` letters, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    blocks = [packer.compress(b"a" * 2**20) for _ in range(size // 2**20)]
    return b"".join([*blocks, packer.flush()])


ODD = {
    "2 MB of text": lambda: chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
    "40 MB of text": lambda: chunk(b"tEXt", b"Comment\0" + b"x" * 40_000_000),
    "2 MB of compressed text": lambda: chunk(b"zTXt", b"Comment\0\0" + compressed(2**21)),
    "2 MB of Unicode": lambda: chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + compressed(2**21)),
    "much text": lambda: chunk(b"zTXt", b"Comment\0\0" + compressed(2**20)) * 70,
    "100 MB of compressed text": lambda: chunk(b"zTXt", b"Comment\0\0" + compressed(100 * 2**20)),
    "text of an unknown method": lambda: chunk(b"zTXt", b"Comment\0\5x"),
    "text with a bad checksum": lambda: chunk(b"tEXt", b"Comment\0x", checksum=1),
    "text that is a word of PIL's": lambda: chunk(b"tEXt", b"transparency\0no"),
    "2 MB of profile": lambda: chunk(b"iCCP", b"icc\0\0" + compressed(2**21)),
    "a broken profile": lambda: chunk(b"iCCP", b"icc\0\0not compressed"),
    "a profile of an unknown method": lambda: chunk(b"iCCP", b"icc\0\7"),
    "no profile": lambda: chunk(b"iCCP", b""),
    "broken EXIF": lambda: chunk(b"eXIf", b"MM\0*\0\0\0\xff"),
    "short numbers": lambda: b"".join(
        chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL")
    ),
}


@pytest.mark.parametrize("position", ["before", "behind"])
@pytest.mark.parametrize("kind", ODD)
def test_png_reads_despite_odd_metadata(kind, position):
    """Metadata precedes or follows the pixels. It is not decompressed."""
    image = Image.fromarray(photo(1))
    plain = encoded(image)
    at = 33 if position == "before" else plain.rindex(b"IEND") - 4
    content = plain[:at] + ODD[kind]() + plain[at:]
    tracemalloc.start()
    actual = read_image(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(actual, np.asarray(image))
    assert peak < 2**20


@pytest.mark.parametrize("kept", [4, 9, 1000])
def test_png_reads_despite_cut_text(kept):
    content = encoded(Image.fromarray(photo(1)))
    end = content.rindex(b"IEND") - 4
    assert np.array_equal(read_image(content[:end] + chunk(b"tEXt", bytes(2000))[:kept]), photo(1))


@pytest.mark.parametrize("options", [{}, {"default_image": True}, {"blend": 1, "disposal": 2}])
def test_animated_png_gives_its_first_frame(options):
    first, *others = (Image.fromarray(photo(seed)).convert("RGBA") for seed in range(3))
    content = encoded(first, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
        assert np.array_equal(read_image(content), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("kind", ["exif", "icc_profile", "xmp"])
def test_other_formats_read_despite_odd_metadata(form, kind):
    """Random bytes of it are changed. PIL reads it later, or never."""
    exif = Image.Exif()
    exif[0x010E] = "a description " * 10
    metadata = {
        "exif": exif.tobytes(),
        "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }
    metadata["xmp"] = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + b"x" * 300 + b"</x:xmpmeta>"
    content = encoded(Image.fromarray(photo(1)), form, **{kind: metadata[kind]})
    expected, odd = read_image(content), metadata[kind].removeprefix(b"Exif\0\0")
    start, random = content.index(odd), np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(content)
        for offset in random.integers(0, len(odd), 5):
            damaged[start + offset] = random.integers(0, 256)
        assert np.array_equal(read_image(bytes(damaged)), expected)


def saved(tmp_path, image, form="png", **options):
    path = str(tmp_path / f"image.{form}")
    image.save(path, **options)
    return path


def colours(*pixels, mode="RGB"):
    """Return an image of one row."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def row(path):
    """Return the pixels of the one row of a file, as it is read."""
    with open(path, "rb") as file:
        image = read_image(file.read())
    assert image.dtype == np.uint8
    assert image.shape == (1, image.shape[1], 3)
    return [tuple(pixel) for pixel in image[0].tolist()]


RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("mode", "pixels", "expected"),
    [
        ("RGB", [RED, (1, 2, 3), WHITE], [RED, (1, 2, 3), WHITE]),
        ("L", [0, 100, 255], [BLACK, (100, 100, 100), WHITE]),
        ("1", [0, 255, 0], [BLACK, WHITE, BLACK]),
        ("LA", [(0, 255), (0, 0), (100, 255)], [BLACK, WHITE, (100, 100, 100)]),
        ("RGBA", [(*RED, 255), (*RED, 0), (0, 0, 0, 0)], [RED, WHITE, WHITE]),
        ("I;16", [0, 255, 256, 40000, 65535], [(value,) * 3 for value in (0, 0, 1, 156, 255)]),
    ],
)
def test_png_modes_read_as_rgb(tmp_path, mode, pixels, expected):
    image = (
        Image.fromarray(np.array([pixels], dtype=np.uint16))
        if mode == "I;16"
        else colours(*pixels, mode=mode)
    )
    path = saved(tmp_path, image)
    with Image.open(path) as opened:
        assert opened.mode == mode
    assert row(path) == expected


def test_half_transparent_is_half_white(tmp_path):
    [(red, green, blue)] = row(saved(tmp_path, colours((255, 0, 100, 128), mode="RGBA")))
    assert (red, green, blue) == pytest.approx((255, 127, 177), abs=1)


def palette_image():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


def test_palette_gives_its_colours(tmp_path):
    assert row(saved(tmp_path, palette_image())) == [RED, GREEN, (0, 0, 255)]
    assert row(saved(tmp_path, palette_image(), "gif")) == [RED, GREEN, (0, 0, 255)]


@pytest.mark.parametrize("form", ["png", "gif"])
def test_palette_transparency_is_white(tmp_path, form):
    assert row(saved(tmp_path, palette_image(), form, transparency=1)) == [RED, WHITE, (0, 0, 255)]


def test_palette_alpha_values_apply(tmp_path):
    actual = row(saved(tmp_path, palette_image(), transparency=bytes([255, 0, 128])))
    assert actual[:2] == [RED, WHITE]
    assert actual[2] == pytest.approx((127, 127, 255), abs=1)


@pytest.mark.parametrize(
    ("mode", "transparency", "expected"),
    [("RGB", RED, [WHITE, GREEN]), ("L", 76, [WHITE, (150, 150, 150)]), ("1", 0, [WHITE, WHITE])],
)
def test_transparent_colour_is_white(tmp_path, mode, transparency, expected):
    pixels = {"RGB": (RED, GREEN), "L": (76, 150), "1": (0, 255)}[mode]
    assert row(saved(tmp_path, colours(*pixels, mode=mode), transparency=transparency)) == expected


def test_palette_with_alpha_channel_is_read(tmp_path):
    image = Image.new("PA", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([(0, 255), (1, 0)])
    path = saved(tmp_path, image, "tiff")
    with Image.open(path) as opened:
        assert opened.mode == "PA"
    assert row(path) == [RED, WHITE]


def test_cmyk_is_read_as_rgb(tmp_path):
    path = saved(
        tmp_path, colours((0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), mode="CMYK"), "tiff"
    )
    with Image.open(path) as opened:
        assert opened.mode == "CMYK"
    assert row(path) == [RED, BLACK, WHITE]


def picture(form="PNG"):
    return encoded(Image.fromarray(noise(0, 64, 64)), form)


BROKEN = {
    "cut png": (".png", lambda: picture()[:3000]),
    "cut jpeg": (".jpg", lambda: picture("JPEG")[:1000]),
    "cut webp": (".webp", lambda: picture("WEBP")[:1000]),
    "only a header": (".png", lambda: picture()[:33]),
    "damaged png": (".png", lambda: picture()[:60] + bytes(100) + picture()[160:]),
    "no bytes": (".png", lambda: b""),
    "text": (".png", lambda: b"this is no image\n"),
    "zeros": (".jpg", lambda: bytes(5000)),
    "html": (".gif", lambda: b"<!DOCTYPE html><html></html>"),
}
if features.check("avif"):
    BROKEN["cut avif"] = (".avif", lambda: picture("AVIF")[:3000])
    BROKEN["damaged avif"] = (
        ".avif",
        lambda: picture("AVIF")[:81] + b"\xff" + picture("AVIF")[82:],
    )


@pytest.fixture
def with_broken(tmp_path):
    """A function that writes a/0.png, a/1.png, ... with broken files at some numbers."""

    def written(number, broken, kind="text", max_bad=100):
        ending, content = BROKEN[kind]
        (tmp_path / "train" / "a").mkdir(parents=True)
        for index in range(number):
            good = index not in broken
            path = tmp_path / "train" / "a" / f"{index}{'.png' if good else ending}"
            path.write_bytes(
                encoded(Image.new("RGB", (4, 4), (index, 0, 0))) if good else content()
            )
        return scan(str(tmp_path), "train", max_bad=max_bad)

    return written


@pytest.mark.parametrize("kind", BROKEN)
def test_undecodable_image_is_replaced_and_named(with_broken, kind):
    images = with_broken(3, {1}, kind)
    image, label, [bad] = images.read(1)
    assert image[0, 0].tolist() == [2, 0, 0]
    assert label == 0
    assert bad.startswith(images.path(1))
    assert "\n" not in bad


# A file system that fails: its error, and the entry that replaces an image.
FAILING = {
    "No such file or directory": lambda path: None,
    "Is a directory": os.mkdir,
    "Too many levels of symbolic links": lambda path: os.symlink(path, path),
    "Not a directory": lambda path: os.symlink(f"{__file__}/x", path),
    "File name too long": lambda path: os.symlink("x" * 256, path),
}


@pytest.mark.parametrize("error", FAILING)
def test_unreadable_image_is_not_replaced(with_broken, monkeypatch, capsys, error):
    monkeypatch.setattr(files, "PAUSES", (0, 0.1))
    images = with_broken(3, set())
    os.remove(images.path(1))
    FAILING[error](images.path(1))
    with pytest.raises(RunError) as caught:
        images.read(1)
    problem = f"cannot read {images.path(1)}: {error}"
    assert (
        str(caught.value)
        == f"{problem}, tried 3 times in 0.1 s. Check its file system and permissions"
    )
    assert caught.value.code == 1
    assert capsys.readouterr().err == "".join(
        f"warning: {problem}; next try in {pause} s\n" for pause in (0, 0.1)
    )


@pytest.mark.parametrize("error", FAILING)
def test_unreadable_image_is_retried(with_broken, monkeypatch, error):
    images = with_broken(3, set())
    path, away = images.path(1), f"{images.root}/away"
    os.rename(path, away)
    FAILING[error](path)

    def restore(pause):
        os.rmdir(path) if os.path.isdir(path) else None
        os.rename(away, path)

    monkeypatch.setattr(files.time, "sleep", restore)
    image, _, bad = images.read(1)
    assert image[0, 0].tolist() == [1, 0, 0] and not bad


def test_unreadable_image_is_retried_without_stderr(with_broken, monkeypatch):
    images = with_broken(3, set())
    path, away = images.path(1), f"{images.root}/away"
    os.rename(path, away)
    monkeypatch.setattr(files.time, "sleep", lambda pause: os.rename(away, path))
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stderr", full)
    image, _, bad = images.read(1)
    with contextlib.suppress(OSError):
        full.close()
    assert image[0, 0].tolist() == [1, 0, 0] and not bad


# Short memory, and damaged images that need any amount of it.

SHORT = """
import resource, sys
from job.data.folders import scan
from job.errors import RunError
from job import files

files.PAUSES = (0, 0)
images = scan(sys.argv[1], "train", max_bad=9)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = (used + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY)
resource.setrlimit(resource.RLIMIT_AS, limit)
for index in range(len(images)):
    try:
        image, _, bad = images.read(index)
        print(image.shape[0], len(bad))
    except RunError as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error)
        resource.setrlimit(resource.RLIMIT_AS, limit)
"""


@pytest.mark.parametrize("room", [20, 2000])
def test_short_memory_replaces_no_image(tmp_path, room):
    """The process can allocate `room` MB. Without memory, decoders raise errors of any type."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "0.png")
    Image.new("RGB", (3000, 2500)).save(folder / "1.png")
    Image.new("RGB", (3000, 2500)).save(folder / "2.webp")
    done = subprocess.run(
        [sys.executable, "-c", SHORT, tmp_path, str(room)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    short = [
        f"no memory to read {folder}/{name}, tried 3 times in 0 s. Use fewer --workers, "
        for name in ("1.png", "2.webp")
    ]
    expected = ["30 0", *short] if room == 20 else ["30 0", "2500 0", "2500 0"]
    actual = done.stdout.splitlines()
    assert len(actual) == 3 and all(map(str.startswith, actual, expected)), (
        done.stdout + done.stderr
    )


def test_unlimited_memory_demand_is_undecodable(with_broken, monkeypatch):
    images, decoded = with_broken(3, {1}), module.decoded
    monkeypatch.setattr(
        module,
        "decoded",
        lambda content, *more: (
            decoded(content, *more) if content[:1] == b"\x89" else bytearray(2**50)
        ),
    )
    image, _, bad = images.read(1)
    assert image[0, 0].tolist() == [2, 0, 0]
    assert bad == [f"{images.path(1)}: MemoryError"]


# Damaged images on which PIL's decoders raise errors of foreign types.


def with_bytes(content, start, new):
    """Return bytes with `new` at `start`."""
    return content[:start] + new + content[start + len(new) :]


def tiff(kind):
    """Return a TIFF whose offset of the pixels has another type."""
    content = encoded(Image.new("P", (20, 24)), "TIFF")
    return with_bytes(
        content, content.index(struct.pack("<HHI", 273, 4, 1)) + 2, struct.pack("<H", kind)
    )


def spider(number):
    """Return an image of SPIDER, by its header of this number in a stack."""
    return with_bytes(encoded(Image.new("F", (20, 24)), "SPIDER"), 104, struct.pack("<f", number))


# Name: the bytes, and the error.
DAMAGED = {
    "TIFF, text for a number": (
        lambda: tiff(2),
        "'str' object cannot be interpreted as an integer",
    ),
    "TIFF, a fraction": (
        lambda: tiff(5),
        "'IFDRational' object cannot be interpreted as an integer",
    ),
    "SPIDER, no stack": (
        lambda: spider(1),
        "'SpiderImageFile' object has no attribute 'stkoffset'",
    ),
    "SPIDER, an infinite number": (
        lambda: spider(math.inf),
        "cannot convert float infinity to integer",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_decoder_errors_of_any_type_are_undecodable(tmp_path, kind):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.png").write_bytes(DAMAGED[kind][0]())
    Image.new("RGB", (4, 4), (7, 0, 0)).save(tmp_path / "train" / "a" / "1.png")
    images = scan(str(tmp_path), "train", max_bad=1)
    image, _, [bad] = images.read(0)
    assert image[0, 0].tolist() == [7, 0, 0]
    assert bad == f"{images.path(0)}: {DAMAGED[kind][1]}"


# All formats that PIL writes, except ICNS, which is slow and contains a PNG.
SAVED = sorted(Image.SAVE.keys() & set(module.FORMATS) - {"ICNS", "MPO"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", SAVED)
def test_damaged_bytes_have_a_constant_result(form):
    """A few bytes are changed, or the end is cut off, 100 times."""
    mode = {"SPIDER": "F", "MSP": "1", "XBM": "1", "BLP": "P"}.get(form, "RGB")
    content, draw = (
        encoded(Image.fromarray(noise(0, 24, 20)).convert(mode), form),
        random.Random(form),
    )
    for _ in range(100):
        start = draw.randrange(draw.choice([len(content), min(len(content), 200)]))
        size = draw.choice([1, 2, 4, 8])
        new = (
            draw.choice([b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\n", draw.randbytes(1)]) * size
        )
        damaged = draw.choice([with_bytes(content, start, new), content[:start]])
        texts = set()
        for _ in range(2):
            try:
                assert read_image(damaged).shape[2:] == (3,)
            except ValueError as error:
                texts.add(str(error))
        assert len(texts) <= 1 and " at 0x" not in "".join(texts)


def test_replacement_is_the_next_image_and_wraps(with_broken):
    images = with_broken(6, {3, 4, 5})
    for index, (value, names) in {2: (2, []), 3: (0, [3, 4, 5]), 5: (0, [5]), 0: (0, [])}.items():
        image, _, bad = images.read(index)
        assert image[0, 0].tolist() == [value, 0, 0]
        assert [line.split(":")[0] for line in bad] == [images.path(name) for name in names]


def test_replacement_brings_its_own_label(tmp_path):
    for name, content in (("a", b"x"), ("b", encoded(Image.new("RGB", (4, 4))))):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.png").write_bytes(content)
    assert scan(str(tmp_path), "train", max_bad=1).read(0)[1] == 1


@pytest.mark.parametrize("max_bad", [0, 1, 3])
def test_replacement_stops_above_max_bad(with_broken, max_bad):
    images = with_broken(9, range(8), max_bad=max_bad)
    image, _, bad = images.read(0)
    assert len(bad) == max_bad + 1
    assert image.shape[2:] == (3,)


@pytest.mark.parametrize(
    ("lines", "max_bad", "value", "named"),
    [
        ("0 0 1 0 2", 2, 2, "0 1"),
        ("0 0 2", 1, 2, "0"),
        ("0 0 1 2", 1, 0, "0 1"),
        ("0 0 2", 0, 0, "0"),
        ("0 0 0", 9, 0, "0"),
    ],
)
def test_replacement_counts_a_file_listed_twice_once(
    with_broken, tmp_path, lines, max_bad, value, named
):
    """value: of the image's pixels, 0 if it is black."""
    paths = {
        str(index): path for index, path in enumerate(map(with_broken(3, {0, 1}).path, range(3)))
    }
    (tmp_path / "list.txt").write_text("\n".join(paths[number] for number in lines.split()))
    image, _, bad = scan(str(tmp_path / "list.txt"), "train", max_bad=max_bad).read(0)
    assert image[0, 0].tolist() == [value, 0, 0]
    assert [line.split(":")[0] for line in bad] == [paths[number] for number in named.split()]


def test_replacement_of_all_bad_images_is_black(with_broken):
    image, label, bad = with_broken(3, range(3)).read(1)
    assert image.shape[2:] == (3,)
    assert not image.any()
    assert (label, len(bad)) == (0, 3)


def test_digest_depends_on_names_and_order(with_broken, tmp_path):
    images = with_broken(3, [])
    known = [images.digest(seed=0, epoch=epoch, total=1) for epoch in range(50)]
    assert 1 < len(set(known)) <= 6  # orders of three
    assert [scan(str(tmp_path), "train").digest(0, epoch, 1) for epoch in range(50)] == known
    os.rename(images.path(1), f"{tmp_path}/train/a/11.png")
    assert scan(str(tmp_path), "train").digest(0, 0, 1) not in known


def large(mode, sides):
    """Return a picture of a mode that is larger than a strip."""
    pixels = cv2.resize(photo(1, 300, 400), sides)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(cv2.resize(photo(2, 300, 400)[:, :, 0], sides)))
    return (
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16", "1"])
def test_strips_equal_the_full_image(mode, monkeypatch):
    content = encoded(large(mode, (431, 307)))
    expected = read_image(content)
    monkeypatch.setattr(module, "STRIP", 10_000)  # 23 rows
    assert np.array_equal(read_image(content), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("sides", [(431, 307), (2001, 61), (60, 2000)])
def test_large_image_is_averaged_over_squares(mode, sides, monkeypatch):
    content = encoded(large(mode, sides))
    full = read_image(content).astype(float)
    monkeypatch.setattr(module, "STRIP", 5000)
    monkeypatch.setattr(module, "PIXELS", 20_000)
    small = read_image(content)
    factor = math.ceil(math.sqrt(sides[0] * sides[1] / 20_000))
    assert small.shape == (math.ceil(sides[1] / factor), math.ceil(sides[0] / factor), 3)
    rows, columns = (side // factor for side in sides[::-1])  # complete squares
    means = (
        full[: rows * factor, : columns * factor]
        .reshape(rows, factor, columns, factor, 3)
        .mean((1, 3))
    )
    assert np.abs(means - small[:rows, :columns]).max() <= 1


def test_large_jpeg_is_decoded_at_half_size(monkeypatch):
    """This needs a quarter of the memory."""
    content = encoded(large("RGB", (800, 600)), "JPEG", quality=95)
    expected = cv2.resize(read_image(content), (400, 300), interpolation=cv2.INTER_AREA).astype(
        float
    )
    monkeypatch.setattr(module, "PIXELS", 120_000)
    sizes, decode = [], module.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        module.simplejpeg,
        "decode_jpeg",
        lambda *arguments, **named: (sizes.append(named), decode(*arguments, **named))[1],
    )
    small = read_image(content)
    assert sizes == [{"min_height": 300, "min_width": 400}]
    assert small.shape == (300, 400, 3)
    assert np.abs(small - expected).mean() < 2


# JPEGs, which another decoder than PIL reads.

JPEGS = {
    "4:2:0": ("RGB", {}),
    "4:2:2": ("RGB", {"subsampling": 1}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "quality 100": ("RGB", {"quality": 100}),
    "quality 5": ("RGB", {"quality": 5}),
    "progressive": ("RGB", {"progressive": True}),
    "optimised": ("RGB", {"optimize": True}),
    "restart markers": ("RGB", {"restart_marker_blocks": 4}),
    "RGB": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
}


def noting(divisor):
    """Return a reduction by `divisor`, and a list of the sides that it is shown."""
    seen = []
    return lambda *sides: (seen.append(sides), divisor)[1], seen


def pil_pixels(content, divisor=1):
    """Return a JPEG as PIL alone decodes it, (H, W, 3) uint8."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (image.width // divisor, image.height // divisor))
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("divisor", module.DIVISORS)
@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_has_pil_s_pixels(kind, divisor):
    mode, options = JPEGS[kind]
    for sides in ((120, 90), (121, 91), (203, 64)):
        content = encoded(Image.fromarray(photo(3, *sides)).convert(mode), "JPEG", **options)
        reduction, seen = noting(divisor)
        actual = read_image(content, reduction)
        assert np.array_equal(actual, pil_pixels(content, divisor))
        assert actual.shape == (*(math.ceil(side / divisor) for side in sides), 3)
        assert set(seen) == {sides}


def test_jpeg_is_not_decoded_by_pil(monkeypatch):
    """Except where its colours differ."""
    monkeypatch.setattr(module, "decoded_by_pil", lambda *_: "PIL")
    by_pil = set()
    for kind, (mode, options) in JPEGS.items():
        content = encoded(Image.fromarray(photo(3)).convert(mode), "JPEG", **options)
        if isinstance(read_image(content), str):
            by_pil.add(kind)
    assert by_pil == {"CMYK"}


def test_damaged_jpeg_is_read_as_pil_does(capfd):
    """Pixels and errors are PIL's, and the library prints nothing."""
    content, draw = encoded(Image.fromarray(photo(4)), "JPEG"), random.Random(0)
    kinds = set()
    for _ in range(200):
        start = draw.randrange(len(content))
        damaged = with_bytes(content, start, draw.randbytes(draw.choice([1, 3])))
        damaged = draw.choice([damaged, damaged, content[:start]])
        try:
            expected = pil_pixels(damaged)
        except Exception as error:
            kinds.add(type(error))
            with pytest.raises(ValueError, match=re.escape(module.reason(error))):
                read_image(damaged)
        else:
            kinds.add(None)
            assert np.array_equal(read_image(damaged), expected)
    assert len(kinds) > 1 and capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_other_formats_are_not_reduced(form):
    content, (reduction, seen) = encoded(Image.fromarray(photo(3, 90, 120)), form), noting(2)
    actual = read_image(content, reduction)
    assert actual.shape == (90, 120, 3) and seen == [(90, 120)]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_very_large_image_shows_its_reduced_sides(form, monkeypatch):
    content = encoded(large("RGB", (803, 601)), form)
    monkeypatch.setattr(module, "PIXELS", 130_000)
    monkeypatch.setattr(module, "STRIP", 50_000)
    for divisor, height in ((1, 301), (2, 151), (4, 76), (8, 76)):
        reduction, seen = noting(divisor)
        assert len(read_image(content, reduction)) == (height if form == "JPEG" else 301)
        assert set(seen) == {(301, 402)}


@pytest.mark.parametrize("all_bad", [False, True])
def test_read_reduces_the_replacing_image(with_broken, all_bad):
    images, (reduction, seen) = with_broken(3, range(3) if all_bad else {1}), noting(1)
    image, _, _ = images.read(1, reduction)
    assert seen[-1] == image.shape[:2] == ((32, 32) if all_bad else (4, 4))


def test_pgm_of_16_bits_keeps_its_upper_8():
    content = b"P5 4 1 65535\n" + np.array([0, 256, 40000, 65535], dtype=">u2").tobytes()
    assert read_image(content)[0, :, 0].tolist() == [0, 1, 156, 255]


def test_formats_of_other_programs_are_refused():
    """PIL would run Ghostscript, which executes the file's content."""
    assert not {".eps", ".ps", ".h5", ".mpg", ".wmf"} & readable_endings()
    with pytest.raises(ValueError, match="no image of a known format"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


@pytest.mark.parametrize(
    "names", [[], ["a"], ["a", "", "b"], ["a\0b", "c"], ["\udcff ü", "a\n"], [""], ["", ""]]
)
def test_names_survive_joining(names):
    block = Names.of(names)
    assert [block[index] for index in range(len(block))] == names
    assert block.ends.dtype == np.int64 and block.blob.dtype == np.uint8
    both = Names.joined([block, Names.of(["x", "yz"]), block])
    assert [both[index] for index in range(len(both))] == [*names, "x", "yz", *names]
