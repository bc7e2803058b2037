"""Measure all work on ImageNet's 1,281,167 images that decodes none of them.

bench.py starts it: python imagenet.py FOLDER PHOTOS. The images are the hard links of scanning.py,
and the features are made up. Each task has a process of its own, forked after the imports. Its
figures are seconds, processor seconds, and the growth of its peak resident memory (`_bytes`).
`--only` measures some of the tasks.
"""

import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

import scanning
import setting
from job import pack
from job.cluster.children import end_children
from job.data.augment import RandomView
from job.data.folders import TrainingOrder, every_nth_batch, scan
from job.data.image_files import ImageFolder
from job.data.loader import Batches
from job.data.randomness import permutation
from job.data.shards import PackedImages, save_index
from job.data.tars import Shard, read_shard
from job.data.views import RandomViews
from job.evaluate.knn import BATCH, K, Block, nearest, vote
from job.metrics.collapse import spectrum_auc
from job.metrics.log import Log

IMAGES, CLASSES, QUERIES = 1_281_167, 1000, 50_000
TOTAL = 256  # images of a training step
LOADED = 16  # images of the first batch
SHARD = 1000  # images of a shard
PACKED = 4  # shards that are written
READS = 15  # of these shards, for their index
BARE = 4096  # images of a bare product, which reaches the processor's peak
FORK = multiprocessing.get_context("fork")


class Setting:
    """The inputs of the tasks. images: of the folder `root`. loaders: loader processes.

    queries: of the k-NN's times, with 2,048 features. features: queries of its memory.
    """

    def __init__(self, folder: Path, photo: str, files: int, loaders: int, queries: int):
        self.folder, self.files, self.loaders, self.queries = folder, files, loaders, queries
        self.root = scanning.links(folder, photo, files)
        self.images = scan(str(self.root), "train")
        self.names = self.images.names.all()
        self.list = folder / "list.txt"
        train = self.root / "train"
        self.list.write_text("".join(f"{train}/{name}\n" for name in self.names))
        self.features = QUERIES * files // IMAGES + 1
        self.packed = folder / "packed"


def scan_folder(given: Setting) -> dict:
    """List the images of a folder."""
    assert len(scan(str(given.root), "train")) == given.files
    return {}


def read_list(given: Setting) -> dict:
    """List the images of a text file, and find each."""
    assert len(scan(str(given.list), "train")) == given.files
    return {}


def first_batch(given: Setting) -> dict:
    """List the images, start the loader processes, and wait for the first batch.

    `all_cpu_s` includes those of the loader processes.
    """
    images = scan(str(given.root), "train")
    views = RandomViews(images, RandomView(64, aug_plus=True), 2, seed=0)
    batches = Batches(views, TrainingOrder(images, LOADED, 0, 1, 0, 1), given.loaders)
    next(batches)
    own = [scanning.own_memory(process.pid) for process in batches.processes]
    started = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    end_children()
    used = time.process_time() + sum(times.user + times.system for times in started)
    return {"all_cpu_s": used, "loader_bytes": statistics.mean(own)}


def order(given: Setting) -> dict:
    """Compute an epoch's order, and its digest, which each checkpoint has."""
    given.images.order(0, 1, TOTAL)
    given.images.digest(0, 1, TOTAL)
    return {}


def passes(given: Setting) -> dict:
    """Divide all images into the batches of a pass of 8 workers, as k-NN does."""
    every_nth_batch(range(given.files), BATCH, 0, 8)
    return {}


def plan_packing(given: Setting) -> dict:
    """Do all of a packing that reads no image: list, fingerprint and order."""
    images = pack.unpacked(str(given.root), "train")
    pack.begin(str(given.folder / "part"), {"train": images}, pack.Options(SHARD, 0))
    permutation(len(images), 0, "pack")
    return {}


def write_shards(given: Setting) -> dict:
    """Pack a few shards, and read them back for their index. Also copy the same files."""
    count = min(PACKED * SHARD, given.files)
    numbers = permutation(given.files, 0, "pack")[:count]
    some = ImageFolder(
        given.images.root,
        given.images.classes,
        [given.names[number] for number in numbers],
        given.images.labels[numbers],
        0,
    )
    progress, options = pack.Progress(Log(speaks=False), count), pack.Options(SHARD, 0)
    copied = scanning.timed(copy, [some.path(index) for index in range(count)], given.folder)[1]
    folder = str(given.packed / "train")
    packed = scanning.timed(pack.pack_split, folder, some, options, progress)[1]
    return {"image_cpu_s": packed / count, "over_copy": packed / copied}


def copy(paths: list[str], folder: Path) -> None:
    """Copy files into one, and flush it."""
    with open(folder / "copy", "wb") as file:
        for path in paths:
            file.write(Path(path).read_bytes())
        file.flush()
        os.fsync(file.fileno())


def index_shards(given: Setting) -> dict:
    """Read the shards of `write_shards`. `all_cpu_s` is for all images."""
    paths = sorted((given.packed / "train").glob("*.tar"))
    shards, used = [], []
    for _ in range(READS):
        _, cpu, shards = scanning.timed(lambda: [read_shard(str(path)) for path in paths])
        used.append(cpu)
    images = sum(len(shard.names) for shard in shards)
    return {"all_cpu_s": statistics.median(used) / images * given.files}


def made_up_shards(given: Setting) -> list[Shard]:
    """Return shards of all images, without their files."""
    shards = []
    for first in range(0, given.files, SHARD):
        names = given.names[first : first + SHARD]
        offsets, sizes = [512 * number for number in range(len(names))], [512] * len(names)
        labels = given.images.labels[first : first + SHARD].tolist()
        shard = Shard(f"train-{len(shards):06d}.tar", 512, offsets, sizes, labels, names)
        shards.append(shard)
    return shards


def save_index_of_all(given: Setting) -> dict:
    """Save the index of all images in made-up shards."""
    shards = made_up_shards(given)
    root = given.folder / "index"
    root.mkdir(exist_ok=True)
    for shard in shards:
        (root / shard.name).write_bytes(bytes(shard.size))
    save_index(str(root), given.images.classes, shards)
    return {}


def open_index(given: Setting) -> dict:
    """Read the index that `save_index_of_all` has saved."""
    assert len(PackedImages(str(given.folder / "index"), 0)) == given.files
    return {}


def packed_order(given: Setting) -> dict:
    """Compute an epoch's order of packed images, and its digest."""
    images = PackedImages(str(given.folder / "index"), 0)
    images.order(0, 1, TOTAL)
    images.digest(0, 1, TOTAL)
    return {}


def features(given: Setting, width: int) -> Iterator[Block]:
    """Yield a block of features for each 64 images.

    A block begins 16 values behind the one before. So its features are new, but cost no time.
    """
    count = given.files // BATCH
    pool = torch.randn(BATCH * width + 16 * count) / math.sqrt(width)
    labels = torch.arange(count + BATCH) % CLASSES
    for block in range(count):
        yield pool.as_strided((BATCH, width), (width, 1), 16 * block), labels[block:][:BATCH]


def knn(given: Setting, width: int) -> dict:
    """Find the nearest of all images to a few queries. Compare with the bare products.

    `core_hours` is for 50,000 queries.
    """
    count = given.queries * 2048 // width  # the same number of multiplications for each width
    queries = torch.randn(count, width) / math.sqrt(width)
    bank = torch.randn(BARE, width)
    products = max(1, given.files // BARE // 10)

    def bare() -> None:
        for _ in range(products):
            queries @ bank.T

    bare()
    before = scanning.timed(bare)[1]
    found = scanning.timed(nearest, queries, features(given, width), K)[1]
    after = scanning.timed(bare)[1]
    of_all = (before + after) / 2 / (products * BARE) * given.files
    hours = found / count * QUERIES / 3600
    return {"over_products": found / of_all, "core_hours": hours}


def knn_2048(given: Setting) -> dict:
    """The k-NN of a ResNet-50's features."""
    return knn(given, 2048)


def knn_512(given: Setting) -> dict:
    """The k-NN of a ResNet-18's features."""
    return knn(given, 512)


def knn_votes(given: Setting) -> dict:
    """Search a few blocks for as many queries as ImageNet has, vote, and compute the AUC."""
    queries = torch.randn(given.features, 2048) / math.sqrt(2048)
    blocks = [block for block, _ in zip(features(given, 2048), range(4), strict=False)]
    vote(nearest(queries, blocks, K), K, CLASSES)
    spectrum_auc(queries)
    return {}


TASKS: dict[str, Callable[[Setting], dict]] = {
    "folder": scan_folder,
    "list": read_list,
    "first_batch": first_batch,
    "order": order,
    "passes": passes,
    "pack_plan": plan_packing,
    "pack": write_shards,
    "index": index_shards,
    "index_save": save_index_of_all,
    "index_open": open_index,
    "packed_order": packed_order,
    "knn_votes": knn_votes,
    "knn_512": knn_512,
    "knn_2048": knn_2048,
}
# Their time is that of products and of copies, which have figures of their own.
COMPUTING = ("pack", "knn_512", "knn_2048")


def resident(name: str) -> int:
    """Return the bytes of this process's VmRSS, or of its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measured(task: Callable[[Setting], dict], given: Setting) -> dict:
    """Do a task in a forked process. Return its figures."""
    receiver, sender = FORK.Pipe(duplex=False)

    def work() -> None:
        before = resident("VmRSS")
        seconds, cpu, more = scanning.timed(task, given)
        figures = {"s": seconds, "cpu_s": cpu, "bytes": resident("VmHWM") - before}
        sender.send(figures | more)

    process = FORK.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the task {task.__name__} has failed; see the lines above") from None
    finally:
        process.join()


def measure(given: Setting, only: list[str]) -> dict:
    """Return the figures of the tasks, and the largest of all that neither pack nor search."""
    found = {name: measured(TASKS[name], given) for name in only}
    figures = {
        f"imagenet_{name}_{key}": value for name in only for key, value in found[name].items()
    }
    used = {
        name: max(value for key, value in found[name].items() if key.endswith("cpu_s"))
        for name in only
        if name not in COMPUTING
    }
    if used:
        figures["imagenet_slowest"] = slowest = max(used, key=used.__getitem__)
        figures["imagenet_slowest_cpu_s"] = used[slowest]
        figures["imagenet_largest_gb"] = max(found[name]["bytes"] for name in used) / 1e9
    return figures


def main() -> None:
    parser = setting.repeating(__doc__, repeats=1)
    parser.add_argument("--files", type=int, default=IMAGES)
    parser.add_argument("--loaders", type=int, default=16)
    parser.add_argument("--queries", type=int, default=640)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    photo = setting.photos(options.photos)[0]
    given = Setting(options.folder, photo, options.files, options.loaders, options.queries)
    try:
        figures = measure(given, options.only)
    finally:
        for name in ("packed", "part", "index"):
            shutil.rmtree(options.folder / name, ignore_errors=True)
    setting.write_figures(options.folder, "imagenet", **figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
