"""Pack an image folder into tar shards, for file systems that are slow with many small files; or index shards that are there.

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

READERS = 16  # files are read so many at a time: a file system on a network answers each late, but many at once
AHEAD = 256  # files that are held in memory at most
FINGERPRINT = "packing.sha256"  # in a folder that is not whole yet


@dataclass
class Options:
    """The options of `job.pack`."""

    shard_images: int = option(1000, "images in a shard", at_least=1)
    seed: int = option(0, "the order of the images follows from it", at_least=0, below=2**63)


class Progress:
    """How far a packing is, shown a hundred times where there is no terminal."""

    def __init__(self, log: Log, total: int):
        self.log, self.total, self.done, self.begun = log, total, 0, time.monotonic()
        self.found = 0  # images whose shards were there

    def tell(self, shard: str) -> None:
        """One more image is in a shard."""
        self.done += 1
        rate = (self.done - self.found) / max(1e-9, time.monotonic() - self.begun)
        left = (self.total - self.done) / rate
        text = f"packing {shard}: {self.done} of {self.total} images, {rate:.0f} images/s, {left:.0f} s to go"
        self.log.progress(text, self.done, self.total, -(-self.total // 100))

    def skip(self, images: int) -> None:
        """So many images were packed before."""
        self.done += images
        self.found += images


def pack(data: str, out: str, options: Options, log: Log) -> dict[str, list[Shard]]:
    """Write the shards of `data` into the folder `out`; return them. RunError: `out` is there, or `data` no folder.

    The folder appears when it is whole. What an earlier packing of the same images has left in OUT.part is used.
    """
    if os.path.lexists(out):
        raise RunError(f"{out} is there already: name another folder, or remove it")
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
    """Return the images of a split. RunError: there are none, or they are packed."""
    images = scan(data, split)
    if not isinstance(images, ImageFolder):
        raise RunError(f"{images.root} is packed already: train from {data} as it is")
    return images


def begin(part: str, sources: dict[str, ImageFolder], options: Options) -> str:
    """Make the folder `part`, or take it as it is. RunError: it was begun with other images or options."""
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
            f"cannot make the folder {part}: {error.strerror}; name another OUT"
        ) from None
    if os.listdir(part) in ([], [f"{FINGERPRINT}.new"]):
        with whole_file(path) as file:
            file.write(expected.encode())
    found = open(path).read() if os.path.exists(path) else ""
    if found != expected:
        raise RunError(
            f"{part} is left from a packing of other images or with other options: remove it, and pack again"
        )
    return part


def pack_split(
    folder: str, images: ImageFolder, options: Options, progress: Progress
) -> list[Shard]:
    """Write the shards of `images`, shuffled, into `folder`, unless they are there; return what is in each."""
    os.makedirs(folder, exist_ok=True)
    order = permutation(len(images), options.seed, "pack")
    shards = []
    for first in range(0, len(order), options.shard_images):
        name = f"{os.path.basename(folder)}-{first // options.shard_images:06d}.tar"
        path, numbers = os.path.join(folder, name), order[first : first + options.shard_images]
        if os.path.exists(path):
            progress.skip(len(numbers))
        else:
            write_shard(
                path, contents(images, numbers, first, functools.partial(progress.tell, name))
            )
        shards.append(read_shard(path))
    return shards


def contents(
    images: ImageFolder, numbers: np.ndarray, first: int, done: Callable[[], None]
) -> Iterator[tuple[int, str, int, bytes]]:
    """Yield (key, name, label, bytes) of each image; keys count from `first`. Call `done` after each.

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
    """What is packed in `data`, and how it is trained from: a line each."""
    parts = []
    for split, shards in packed.items():
        images, size = (
            sum(len(shard.names) for shard in shards),
            sum(shard.size for shard in shards),
        )
        parts.append(f"{images} {split} images in {len(shards)} shards, {size / 1e6:.1f} MB")
    return ["; ".join(parts), f"train from it with: mgd-train {data}"]


@output.guarded()
def main(argv: list[str] | None = None) -> None:
    """Run `job.pack` on the command line's options. Needs no Horovod."""
    log = Log(speaks=True)
    try:
        parser = Parser(
            prog="job.pack",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "data",
            metavar="DIR",
            type=expand,
            help="a folder or a list, as job.train takes it, or digits",
        )
        parser.add_argument(
            "out",
            metavar="OUT",
            nargs="?",
            type=expand,
            help="the folder to write, to train from in place of DIR",
        )
        parser.add_argument(
            "--index",
            action="store_true",
            help="only make the index of shards in DIR/train/*.tar, and val/",
        )
        for f in fields(Options):
            parser.add_argument(
                flag(f.name),
                metavar="X",
                default=f.default,
                help=f"{f.metadata['text']} (default: {f.default})",
            )
        given = parser.parse_args(argv)
        options = Options(
            *(convert(f, getattr(given, f.name), flag(f.name)) for f in fields(Options))
        )
        if given.index == bool(given.out):
            wrong = (
                "--index writes into DIR itself: leave out OUT"
                if given.out
                else "no OUT: name the folder to write"
            )
            raise RunError(f"{wrong}, as in `job.pack DIR OUT` or `job.pack --index DIR`")
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
        kept = "" if given.index else "; what is packed is kept"
        end(
            log,
            f"error: {error.filename or given.out or given.data}: {error.strerror or error}{kept}",
            1,
        )
    except KeyboardInterrupt:
        end(log, "stopped; the same command goes on from here", 130)


def end(log: Log, line: str, code: int) -> None:
    """Say the last line, and exit."""
    log.end_progress()
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
