"""Measure the steps from a file to a batch, decoders of JPEGs, and loader processes' memory.

bench.py starts it: python images.py FOLDER PHOTOS. Files are in the system's cache. Times are of
the processor, in one thread: milliseconds an image, medians of turns in one process. One image has
two views of MoCo v2. A ratio of two tasks is the median of the turns' ratios.

Decoders that are not installed are left out. They are no part of the program:

    .venv/bin/pip install --no-deps imagecodecs torchcodec
"""

import contextlib
import importlib
import io
import statistics
from pathlib import Path

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
import torchvision
from PIL import Image

import baseline
import setting
from job.cluster.children import end_children
from job.cluster.memory import keep_freed_memory
from job.data import views as views_module
from job.data.augment import FLIP, NONE, OPERATIONS, SIGMA, RandomView, cut, pixels
from job.data.folders import TrainingOrder, scan
from job.data.images import DIVISORS, prepare_process, read_image
from job.data.loader import Batches
from job.data.loader_process import KEPT
from job.data.parcel import Parcel, unpack
from job.data.render import render
from job.data.render_batch import HUE
from job.data.views import RandomViews, collate

SIDES = {  # of JPEGs: width, height and number
    "500": (setting.PHOTO_SIZE, 16),
    "2000": ((2000, 1500), 4),
    "4000": ((4000, 3000), 2),
}
BATCH = 32  # images of a step of the loader processes
REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}
REDUCED |= {1: 0, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}


def milliseconds(times: dict[str, list[float]], images: int) -> dict[str, float]:
    """Return the median of each task for one image."""
    return {name: 1e3 * statistics.median(values) / images for name, values in times.items()}


# The steps.


def appearances(rows: list[np.ndarray], kept: str) -> list[np.ndarray]:
    """Return appearances with only one part of them: colours, hue, blur or flip."""
    result = []
    for row in rows:
        row = row.copy()
        hued = row[OPERATIONS] == HUE
        if kept != "flip":
            row[FLIP] = 0
        if kept != "blur":
            row[SIGMA] = 0
        if kept == "hue":
            row[OPERATIONS][~hued] = NONE
        if kept == "colours":
            row[OPERATIONS][hued] = NONE
        if kept in ("blur", "flip"):
            row[OPERATIONS] = NONE
        result.append(row)
    return result


def steps(folder: Path, size: int, repeats: int) -> dict:
    """Return the milliseconds of each step for one image."""
    images = scan(str(folder), "train")
    everything = range(len(images))
    view = RandomView(size, aug_plus=True)
    views = RandomViews(images, view, 2, seed=0)
    contents = [images.content(index) for index in everything]
    decoded = [read_image(content) for content in contents]
    random = np.random.default_rng(0)
    drawn = [(image, view.draw(*image.shape[:2], random)) for image in decoded for _ in range(2)]
    crops = [cut(image, crop, size).permute(1, 2, 0).numpy() for image, (crop, _) in drawn]
    rows = [row for _, (_, row) in drawn]
    views_made = [pixels(render(crop, row)) for crop, row in zip(crops, rows, strict=True)]
    items = list(zip(views_made[::2], views_made[1::2], [[] for _ in everything], strict=True))
    batch = collate(items[:BATCH])
    batches = len(items) / BATCH

    def rendering(part: str):
        parts = appearances(rows, part)
        return lambda: [render(crop, row) for crop, row in zip(crops, parts, strict=True)]

    def sending() -> None:
        for _ in range(round(batches)):
            parcel = Parcel(batch)
            for each in unpack(parcel.memory, parcel.sizes)[:2]:
                each.as_strided((each.numel() // 4096,), (4096,)).sum()  # touches each page

    tasks = {
        "read": lambda: [images.content(index) for index in everything],
        "decode": lambda: [read_image(content) for content in contents],
        "draw": lambda: [view.draw(375, 500, random) for _ in drawn],
        "crop": lambda: [cut(image, crop, size) for image, (crop, _) in drawn],
        "colours": rendering("colours"),
        "hue": rendering("hue"),
        "blur": rendering("blur"),
        "flip": rendering("flip"),
        "collate": lambda: collate(items),
        "send": sending,
        "all": lambda: [views[0, index] for index in everything],
    }
    figures = milliseconds(setting.interleaved(tasks, repeats, setting.cpu_seconds), len(images))
    return {f"images_{name}_ms": value for name, value in figures.items()}


# Decoders.


def by_pil(content: bytes, divisor: int) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (image.width // divisor, image.height // divisor))
        return np.array(image)


def by_opencv(content: bytes, divisor: int) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB | REDUCED[divisor]
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def by_simplejpeg(content: bytes, divisor: int) -> np.ndarray:
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    least = [-(-side // divisor) if divisor > 1 else 0 for side in (height, width)]
    return simplejpeg.decode_jpeg(content, min_height=least[0], min_width=least[1])


def fast_simplejpeg(content: bytes, divisor: int) -> np.ndarray:
    """Decode with a less exact transform, and without smooth colours."""
    return simplejpeg.decode_jpeg(content, fastdct=True, fastupsample=True)


def by_tensors(decode):
    """Return a decoder of torch's tensors as a decoder of bytes."""
    return lambda content, _: decode(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def decoders() -> dict:
    """Return {name: (decoder, divisors of the sides)}: what is installed."""
    result = {
        "pil": (by_pil, DIVISORS),
        "opencv": (by_opencv, DIVISORS),
        "simplejpeg": (by_simplejpeg, DIVISORS),
        "simplejpeg_fast": (fast_simplejpeg, (1,)),
        "torchvision": (by_tensors(torchvision.io.decode_jpeg), (1,)),
    }
    with contextlib.suppress(ImportError, RuntimeError):
        torchcodec = importlib.import_module("torchcodec.decoders")
        result["torchcodec"] = by_tensors(torchcodec.decode_jpeg), (1,)
    with contextlib.suppress(ImportError):
        codecs = importlib.import_module("imagecodecs")
        result["imagecodecs"] = (lambda content, _: codecs.jpeg8_decode(content)), (1,)
    return result


def decoding(contents: list[bytes], name: str, repeats: int) -> dict:
    """Return each decoder's milliseconds, and its speed over PIL's. name: of the JPEGs' size."""
    tasks = {
        f"{decoder}_{divisor}": lambda decode=decode, divisor=divisor: [
            decode(content, divisor) for content in contents
        ]
        for decoder, (decode, divisors) in decoders().items()
        for divisor in divisors
    }
    times = setting.interleaved(tasks, repeats, setting.cpu_seconds)
    figures = {
        f"jpeg_{name}_{task}_ms": value
        for task, value in milliseconds(times, len(contents)).items()
    }
    for task, values in times.items():
        figures[f"jpeg_{name}_{task}_over_pil"] = setting.ratio(times["pil_1"], values)
    return figures


def reducing(folder: Path, name: str, size: int, repeats: int) -> dict:
    """Return the speed of two views with reduced JPEGs, over full ones and over PIL's."""
    images = scan(str(folder), "train")
    paths = setting.photos(folder)
    floats = baseline.Images(paths, baseline.random_view(size), baseline.random_view(size))
    views = RandomViews(images, RandomView(size, aug_plus=True), 2, seed=0)
    everything = [(epoch, index) for epoch in range(4) for index in range(len(images))]

    def full() -> None:
        divisor, views_module.divisor = views_module.divisor, lambda *_: 1
        [views[draw] for draw in everything]
        views_module.divisor = divisor

    tasks = {
        "reduced": lambda: [views[draw] for draw in everything],
        "full": full,
        "pil": lambda: [floats[index] for _, index in everything],
    }
    times = setting.interleaved(tasks, repeats, setting.cpu_seconds)
    return {
        f"views_{name}_ms": milliseconds(times, len(everything))["reduced"],
        f"views_{name}_over_full": setting.ratio(times["full"], times["reduced"]),
        f"views_{name}_over_pil": setting.ratio(times["pil"], times["reduced"]),
    }


# Memory.


def memory(folder: Path, size: int, processes: int) -> dict:
    """Return the memory of loader processes after some batches: of one, and of all."""
    images = scan(str(folder), "train")
    views = RandomViews(images, RandomView(size, aug_plus=True), 2, seed=0)
    batches = Batches(views, TrainingOrder(images, BATCH, 0, 1, 0, 2 * processes), processes)
    for _ in range(2 * processes):
        next(batches)
    held = [psutil.Process(process.pid).memory_full_info() for process in batches.processes]
    end_children()
    return {
        f"loaders_{processes}_unique_bytes": statistics.mean(each.uss for each in held),
        f"loaders_{processes}_resident_bytes": statistics.mean(each.rss for each in held),
        f"loaders_{processes}_total_bytes": sum(each.pss for each in held),
    }


def main() -> None:
    parser = setting.repeating(__doc__, repeats=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for processes in options.processes:
        figures |= memory(options.photos, options.size, processes)
    setting.pin()
    keep_freed_memory(KEPT)  # as in a loader process
    prepare_process()
    figures |= steps(options.photos, options.size, options.repeats)
    for name, (sides, count) in SIDES.items():
        folder = options.folder / f"jpegs{name}"
        setting.write_photos(folder, count, sides)
        contents = [Path(path).read_bytes() for path in setting.photos(folder)]
        figures |= decoding(contents, name, options.repeats)
        if sides != setting.PHOTO_SIZE:
            figures |= reducing(folder, name, options.size, min(3, options.repeats))
    setting.write_figures(options.folder, "images", **figures)


if __name__ == "__main__":
    main()
