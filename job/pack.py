"""Pack images into tar shards, for file systems that are slow with small files, or index shards.

python -m job.pack DIR OUT [--shard-images 1000] [--seed 0]      python -m job.pack --index DIR
"""

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from job import output
from job.cli import Parser
from job.data import digits
from job.data.folders import ImageFolder, scan
from job.data.index import index
from job.data.randomness import permutation
from job.data.shards import SPLITS, save_index
from job.data.tars import Shard, read_shard, write_shard
from job.declare import convert, expand, flag, option
from job.errors import RunError
from job.files import patient, whole_file
from job.metrics.log import Log

READERS = 16  # threads: a network file system is slow for one file, but serves many at once
AHEAD = 256  # files in memory at most
FINGERPRINT = "packing.sha256"  # in an incomplete folder


@dataclass
class Options:
    """The options of `job.pack`."""

    shard_images: int = option(1000, "images in a shard", at_least=1)
    seed: int = option(0, "seed of the order of the images", at_least=0, below=2**63)


class Progress:
    """The progress of a packing, logged a hundred times outside a terminal."""

    def __init__(self, log: Log, total: int):
        self.log, self.total, self.done, self.start = log, total, 0, time.monotonic()
        self.skipped = 0  # images of existing shards

    def add(self, shard: str) -> None:
        """Count an image that is in a shard, and log."""
        self.done += 1
        rate = (self.done - self.skipped) / max(1e-9, time.monotonic() - self.start)
        left = (self.total - self.done) / rate
        count = f"{self.done} of {self.total} images"
        text = f"packing {shard}: {count}, {rate:.0f} images/s, {left:.0f} s left"
        self.log.progress(text, self.done, self.total, -(-self.total // 100))

    def skip(self, images: int) -> None:
        """Count images that an earlier packing has written."""
        self.done += images
        self.skipped += images


def pack(data: str, out: str, options: Options, log: Log) -> dict[str, list[Shard]]:
    """Write the shards of `data` into the folder `out`. Return them by split.

    The folder appears when it is complete. Shards that an earlier packing of the same images has
    written to OUT.part are kept. RunError: `out` exists, or `data` is not a folder.
    """
    if os.path.lexists(out):
        raise RunError(f"OUT {out}: exists; expected a new folder. Name another one, or remove it")
    others = [split for split in SPLITS[1:] if os.path.isdir(os.path.join(data, split))]
    sources = {split: unpacked(data, split) for split in ("train", *others)}
    for images in sources.values():
        if images.left_out:
            log.line(images.left_out)
    part = begin(f"{out.rstrip('/')}.part", sources, options)
    progress = Progress(log, sum(map(len, sources.values())))
    packed = {
        split: pack_split(os.path.join(part, split), images, options, progress)
        for split, images in sources.items()
    }
    for split, shards in packed.items():
        save_index(os.path.join(part, split), sources[split].classes, shards)
    os.rename(part, out)
    os.remove(os.path.join(out, FINGERPRINT))
    return packed


def unpacked(data: str, split: str) -> ImageFolder:
    """Return the images of a split. RunError: the split is empty, or packed."""
    images = scan(data, split)
    if not isinstance(images, ImageFolder):
        raise RunError(f"DIR {images.root}: already packed. Train from {data}")
    return images


def begin(part: str, sources: dict[str, ImageFolder], options: Options) -> str:
    """Make or reuse the folder `part`. RunError: it has other images or options."""
    names = [
        (split, images.classes, *map(images.names.__getitem__, range(len(images))))
        for split, images in sources.items()
    ]
    content = json.dumps([options.shard_images, options.seed, names]).encode()
    expected, path = hashlib.sha256(content).hexdigest(), os.path.join(part, FINGERPRINT)
    try:
        os.makedirs(part, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the folder {part}: {error.strerror}. Name another OUT"
        ) from None
    if os.listdir(part) in ([], [f"{FINGERPRINT}.new"]):
        with whole_file(path) as file:
            file.write(expected.encode())
    before = open(path).read() if os.path.exists(path) else ""
    if before != expected:
        raise RunError(
            f"{part}: from a packing with other images or options. Remove it, and pack again"
        )
    return part


def pack_split(
    folder: str, images: ImageFolder, options: Options, progress: Progress
) -> list[Shard]:
    """Write the missing shards of `images`, shuffled, into `folder`. Return all shards."""
    os.makedirs(folder, exist_ok=True)
    order = permutation(len(images), options.seed, "pack")
    shards = []
    for first in range(0, len(order), options.shard_images):
        name = f"{os.path.basename(folder)}-{first // options.shard_images:06d}.tar"
        path, numbers = os.path.join(folder, name), order[first : first + options.shard_images]
        if os.path.exists(path):
            progress.skip(len(numbers))
        else:
            done = functools.partial(progress.add, name)
            write_shard(path, contents(images, numbers, first, done))
        shards.append(read_shard(path))
    return shards


def contents(
    images: ImageFolder, numbers: np.ndarray, first: int, done: Callable[[], None]
) -> Iterator[tuple[int, str, int, bytes]]:
    """Yield (key, name, label, bytes) of each image, and call `done` after it.

    Keys start at `first`.
    RunError: the file system fails. IrregularFile: a file is special or too large.
    """

    def content(number: int) -> bytes:
        return patient(functools.partial(images.content, number), images.path(number))

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(numbers), AHEAD):
            some = numbers[start : start + AHEAD].tolist()
            for key, (number, data) in enumerate(
                zip(some, pool.map(content, some), strict=True), first + start
            ):
                yield key, images.names[number], int(images.labels[number]), data
                done()


def summary(data: str, packed: dict[str, list[Shard]]) -> list[str]:
    """Return lines about the packed images, and the command that trains from them."""
    parts = []
    for split, shards in packed.items():
        images = sum(len(shard.names) for shard in shards)
        size = sum(shard.size for shard in shards) / 1e6
        parts.append(f"{images} {split} images in {len(shards)} shards, {size:.1f} MB")
    return ["; ".join(parts), f"train from it with: mgd-train {data}"]


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="job.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data",
        metavar="DIR",
        type=expand,
        help="a folder of images, a text file with a path a line, or digits",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        type=expand,
        help="the folder to write, which replaces DIR for training",
    )
    parser.add_argument(
        "--index",
        action="store_true",
        help="index existing shards: DIR/train/*.tar or DIR/*.tar, and DIR/val/*.tar",
    )
    for f in fields(Options):
        parser.add_argument(
            flag(f.name),
            metavar="X",
            default=f.default,
            help=f"{f.metadata['text']} (default: {f.default})",
        )
    return parser


@output.guarded()
def main(argv: list[str] | None = None) -> None:
    """Run `job.pack` on the command line's options, without Horovod."""
    log = Log(speaks=True)
    try:
        given = build_parser().parse_args(argv)
        options = Options(
            *(convert(f, getattr(given, f.name), flag(f.name)) for f in fields(Options))
        )
        if given.index == bool(given.out):
            problem = (
                f"OUT {given.out}: no effect with --index, which writes into DIR; leave it out"
                if given.out
                else "OUT: missing; expected a folder to write"
            )
            raise RunError(f"{problem}, as in `job.pack DIR OUT` or `job.pack --index DIR`")
        packed = (
            index(given.data, log)
            if given.index
            else pack(digits.prepared(given.data), given.out, options, log)
        )
        log.end_progress()
        for line in summary(given.out or given.data, packed):
            log.line(line)
    except RunError as error:
        end(log, f"error: {error}", error.code)
    except OSError as error:
        kept = "" if given.index else ". Complete shards are kept"
        end(
            log,
            f"error: {error.filename or given.out or given.data}: {error.strerror or error}{kept}",
            1,
        )
    except KeyboardInterrupt:
        end(log, "stopped. Resume with the same command", 130)


def end(log: Log, line: str, code: int) -> None:
    """Print the last line, and exit."""
    log.end_progress()
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
