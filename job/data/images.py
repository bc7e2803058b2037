"""The base of every set of images: names, labels, and decoding."""

import functools
import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from job.cluster.travels import travels
from job.data import plugins
from job.files import patient
from job.text import printable

# Larger images are reduced by an integer as they are read: no view needs so many pixels.
PIXELS = 2**24
JPEG = b"\xff\xd8\xff"  # its first bytes
# libjpeg-turbo can divide the sides of a JPEG by these numbers as it decodes it.
DIVISORS = (1, 2, 4, 8)
# (height, width) of an image, in pixels -> one of DIVISORS. `read_image` calls it for each image,
# and divides the sides of a JPEG by the result.
Reduction = Callable[[int, int], int]
BLACK = 32  # pixels, the sides of the image that replaces too many undecodable ones
# Larger images are converted to RGB in strips of so many pixels: each conversion makes a copy.
STRIP = 2**20
# PIL only detects these formats. To decode them it needs other programs, and the one for EPS
# executes the file's content.
NOT_DRAWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Bytes of the largest image that PIL reads, with 4 bytes a pixel.
LARGEST = 8 * (Image.MAX_IMAGE_PIXELS or 0)
ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of an object, in an error's text
Image.init()
plugins.register()
FORMATS = [kind for kind in Image.ID if kind not in NOT_DRAWN]
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes
TRANSPARENCY = b"tRNS"  # the only optional chunk that changes the pixels of a PNG's first frame


def whole(height: int, width: int) -> int:
    """Reduce no image."""
    return 1


def prepare_process() -> None:
    """Let this process read images without OpenCV's threads and Pillow's warnings.

    Loader processes compete for the cores, and each would repeat the warnings. An undecodable image
    is an error, which the run logs once.
    """
    cv2.setNumThreads(0)
    warnings.filterwarnings("ignore", module="PIL")


@travels
class Names:
    """Strings in one block of bytes.

    Loader processes have copies, and a million Python strings would fill most of their memory.
    blob: the bytes of all names, uint8. ends: the end of each name in it, int64.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: list[str]) -> "Names":
        """Return `names` as such a block."""
        blob = np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)
        (gaps,) = np.nonzero(blob == 0)
        if len(gaps) == len(names) - 1:
            return cls(blob[blob != 0], np.append(gaps, len(blob)) - np.arange(len(names)))
        encoded = [os.fsencode(name) for name in names]  # one has a zero byte, or the list is empty
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def joined(cls, blocks: Sequence["Names"]) -> "Names":
        """Return the names of several blocks as one block."""
        starts = np.cumsum([0, *(len(block.blob) for block in blocks)], dtype=np.int64)
        ends = [block.ends + start for block, start in zip(blocks, starts, strict=False)]
        blobs = [block.blob for block in blocks]
        return cls(np.concatenate(blobs), np.concatenate(ends))

    def all(self) -> list[str]:
        """Return all names."""
        return [self[index] for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.blob[start : self.ends[index]].tobytes())


class Images:
    """Images below `root`, by number.

    names: of the images, `<class>/<file>`. labels: int64, -1 for an image without one. max_bad:
    how many undecodable images are skipped in search of a decodable one. left_out: a line about the
    files of `root` that are not among the images, or "". held_out: folders of `root` that are kept
    for validation. hints: {id: text} about images that may be a mistake. reading: (1,) int64, the
    index of the image read last, -1 after a black one.
    """

    left_out = ""
    held_out: Sequence[str] = ()
    hints: Mapping[str, str] = MappingProxyType({})
    reading = np.zeros(1, dtype=np.int64)

    def __init__(
        self, root: str, classes: list[str], names: Names, labels: np.ndarray, max_bad: int
    ):
        self.root, self.classes, self.names = root, classes, names
        self.labels, self.max_bad = labels, max_bad

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> int:
        """The number of images with a label."""
        return int((self.labels >= 0).sum())

    @property
    def common_root(self) -> str:
        """The folder that all images' paths begin with, or "" for images of several."""
        return self.root

    @property
    def lines(self) -> list[str]:
        """Log lines of a run on these images, about the files of `root` that it does not use."""
        kept = f"kept for validation: {', '.join(self.held_out)}" if self.held_out else ""
        return [line for line in (self.left_out, kept) if line]

    def some(self, count: float) -> str:
        """Return a number of these images as text: 9 images of DIR, or 8 of 9 images of DIR."""
        return f"{count:.0f} {f'of {len(self)} ' if count < len(self) else ''}images of {self.root}"

    def path(self, index: int) -> str:
        """The path of an image, for people."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The bytes of an image's file."""
        raise NotImplementedError

    def order(self, seed: int, epoch: int, total: int) -> np.ndarray:
        """Return the order of an epoch, int64, no image twice.

        Step s uses the `total` images from index s * total on.
        """
        raise NotImplementedError

    def digest(self, seed: int, epoch: int, total: int) -> str:
        """Return the SHA-256 (first 16 hex digits) of all file names and an epoch's order."""
        return hashlib.sha256(
            self.names.blob.tobytes() + self.order(seed, epoch, total).tobytes()
        ).hexdigest()[:16]

    def pixels(self, index: int, reduction: Reduction = whole) -> np.ndarray:
        """An image, (H, W, 3) uint8. ValueError: it is undecodable."""
        return read_image(self.content(index), reduction)

    def read(self, index: int, reduction: Reduction = whole) -> tuple[np.ndarray, int, list[str]]:
        """Return an image (H, W, 3) uint8, its label, and the undecodable files before it.

        The last call of `reduction` is for the returned image.
        The next decodable image replaces an undecodable one. If more than `max_bad` different files
        in a row are undecodable, or all are, the image is a black one, and the list ends the run.
        RunError: the file system or the memory fails. No image is replaced then, because that would
        change the training.
        """
        bad: dict[str, None] = {}  # a list can name a file twice
        for offset in range(len(self)):
            self.reading[0] = current = (index + offset) % len(self)
            path = printable(self.path(current))
            try:
                pixels = patient(functools.partial(self.pixels, current, reduction), path)
                return pixels, int(self.labels[current]), list(bad)
            except ValueError as error:
                bad[f"{path}: {printable(getattr(error, 'strerror', None) or str(error))}"] = None
            if len(bad) > self.max_bad:
                break
        self.reading[0] = -1
        reduction(BLACK, BLACK)
        return np.zeros((BLACK, BLACK, 3), dtype=np.uint8), int(self.labels[index]), list(bad)


def readable_endings() -> set[str]:
    """The file endings of the formats that PIL can read."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def read_image(content: bytes, reduction: Reduction = whole) -> np.ndarray:
    """Return an image of any format and mode as RGB, (H, W, 3) uint8.

    reduction: divides the sides if it is a JPEG.
    ValueError: the image is incomplete or damaged. The same bytes give the same message.
    MemoryError: there is not enough memory for the largest image that PIL reads. That size is
    tested because a damaged image can request any amount.
    """
    try:
        return decoded(content, reduction)
    except Exception:  # decoders raise any type on damaged bytes, and also if memory is short
        np.empty(LARGEST, dtype=np.uint8)
    try:
        return decoded(content, reduction)  # memory may have been short before
    except Exception as error:
        raise ValueError(reason(error)) from None


def reason(error: Exception) -> str:
    """Return a decoder's error as text that is the same in each process."""
    if isinstance(error, UnidentifiedImageError):  # its text has the buffer's address
        return "no image of a known format"
    text = ADDRESS.sub("", getattr(error, "strerror", None) or str(error))
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")


def decoded(content: bytes, reduction: Reduction = whole) -> np.ndarray:
    """Return an image of any format and mode as RGB, (H, W, 3) uint8.

    Transparent pixels become white, 16-bit grey keeps its upper 8 bits, and an animation gives
    its first frame. An image of more than PIXELS is averaged over squares. Decoding needs little
    more than PIL's 4 bytes a pixel. Images of more than 179 megapixels are refused.
    """
    pixels = decoded_jpeg(content, reduction)
    return decoded_by_pil(content, reduction) if pixels is None else pixels


def decoded_jpeg(content: bytes, reduction: Reduction) -> np.ndarray | None:
    """Return a JPEG as RGB, (H, W, 3) uint8. None: PIL must read it or describe the damage.

    The pixels are those of PIL, which uses the same library, in two thirds of the time.
    """
    if not content.startswith(JPEG):
        return None
    try:
        *sides, colours, _ = simplejpeg.decode_jpeg_header(content)
        height, width = map(int, sides)
        if colours not in ("YCbCr", "Gray", "RGB") or 4 * height * width > LARGEST:
            return None
        divisor = jpeg_divisor(height, width, reduction)
        least = (0, 0) if divisor == 1 else (-(-height // divisor), -(-width // divisor))
        return simplejpeg.decode_jpeg(content, min_height=least[0], min_width=least[1])
    except Exception:  # PIL decides whether it is the image's fault
        return None


def jpeg_divisor(height: int, width: int, reduction: Reduction) -> int:
    """Return the divisor of a JPEG's sides, one of DIVISORS.

    Divided by its smallest value, the image has at most PIXELS. `reduction` multiplies that value.
    """
    sides = {each: (-(-height // each), -(-width // each)) for each in DIVISORS}
    first = next((each for each in DIVISORS if math.prod(sides[each]) <= PIXELS), DIVISORS[-1])
    return min(first * reduction(*sides[first]), DIVISORS[-1])


def decoded_by_pil(content: bytes, reduction: Reduction) -> np.ndarray:
    """Return an image of any format and mode as RGB, (H, W, 3) uint8."""
    with Image.open(io.BytesIO(without_metadata(content)), formats=FORMATS) as opened:
        image: Image.Image = opened
        if content.startswith(JPEG):
            divisor = jpeg_divisor(image.height, image.width, reduction)
            image.draft(None, (image.width // divisor, image.height // divisor))
        image.load()  # some formats have their mode and size only now
        deep = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
        factor = shrinking(image)
        if not content.startswith(JPEG):
            reduction(-(-image.height // factor), -(-image.width // factor))
        if image.width * image.height <= STRIP:
            return np.array(on_white(image, deep))
        rows = max(1, STRIP // image.width // factor) * factor
        small = np.empty((-(-image.height // factor), -(-image.width // factor), 3), dtype=np.uint8)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            small[top // factor : (top + rows) // factor] = np.asarray(
                on_white(strip, deep).reduce(factor)
            )
    return small


def without_metadata(content: bytes) -> bytes:
    """Return a PNG without chunks that do not change its pixels. Other formats are unchanged.

    PIL reads all chunks, and refuses an image with 1 MB of text or an invalid profile.
    """
    if not content.startswith(PNG):
        return content
    parts, start = [PNG], len(PNG)
    while start < len(content):
        length, kind = int.from_bytes(content[start : start + 4]), content[start + 4 : start + 8]
        end = start + 12 + length  # length, kind, content, checksum
        if kind == TRANSPARENCY or not kind[:1].islower():
            parts.append(content[start:end])
        start = end
    return b"".join(parts)


def shrinking(image: Image.Image) -> int:
    """Return the integer by which the sides of an image are divided."""
    return max(1, math.ceil(math.sqrt(image.width * image.height / PIXELS)))


def on_white(image: Image.Image, deep: bool) -> Image.Image:
    """Return an image as RGB, on white if it is transparent. deep: it is grey of 16 bits."""
    if deep:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
