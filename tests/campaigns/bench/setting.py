"""The setting of the bench: photographs, a teacher, pinned cores, options, and where a part leaves its figures."""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from job.config import Config
from job.networks import build_resnet

BATCH = 32  # images of a step on cores, of two workers together
PHOTOS = 2 * BATCH  # of the step's and the refresh's folder
PHOTO_SIZE = (500, 375)  # pixels, about ImageNet's average


def write_photos(folder: Path, images: int) -> None:
    """Write JPEGs with the spectrum of photographs to train/ and val/, the same ones to both."""
    generator = np.random.default_rng(0)
    for number in range(images):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize(PHOTO_SIZE, Image.Resampling.BICUBIC), dtype=np.int16
        )
        noisy = (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        for split in ("train", "val"):
            path = folder / split / str(number % 4) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).save(path, quality=90)


def write_teacher(folder: Path) -> None:
    """Write a ResNet-50 of random weights, laid out as torchvision's own files."""
    torch.manual_seed(5)
    torch.save(build_resnet("resnet50", dim=1000).state_dict(), folder / "teacher.pth")


def photos(folder: Path) -> list[str]:
    """The paths of the training photographs."""
    return sorted(str(path) for path in (folder / "train").rglob("*.jpg"))


def config(folder: Path, images: int, size: int, **options) -> Config:
    """The options of the step: ResNet-18 from ResNet-50 by the published recipe, `images` in a total batch, views of `size`.

    Images are read by the worker itself, so that nothing that a step costs is hidden in another process, and no
    process of one job runs in another's turn.
    """
    recipe = {
        "arch": "resnet18",
        "mlp": True,
        "moco_t": 0.2,
        "aug_plus": True,
        "refresh_epochs": "never",
    }
    recipe |= {"workers": 0, "epochs": 10**6, "save_every": str(10**6), "print_freq": 10**6}
    recipe |= {
        "data": str(folder),
        "teacher": str(folder / "teacher.pth"),
        "image_size": size,
        "batch_size": images,
    }
    return Config(**recipe | options)


def pin(core: int = 0) -> None:
    """Keep this worker to one core, and to one thread there: the first worker of its job to `core`, the next to the next."""
    os.sched_setaffinity(0, {core + int(os.environ.get("HOROVOD_LOCAL_RANK", 0))})
    torch.set_num_threads(1)


def timed(work) -> tuple:
    """What `work()` returns, and the seconds that it takes, the GPU's share included."""
    begun = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begun


def seconds(work) -> float:
    """How long `work()` takes."""
    return timed(work)[1]


def interleaved(tasks: dict, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each of the named tasks, done in turn `repeats` times after a turn to warm up."""
    took = {name: [] for name in tasks}
    for _ in range(repeats + 1):
        for name, work in tasks.items():
            took[name].append(seconds(work))
    return {name: values[1:] for name, values in took.items()}


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the turns' ratios: both sides of each were measured within the same minute."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of every part: where its figures go, and the side of its views."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", type=Path)
    options.add_argument("--size", type=int, default=224)
    return options


def repeating(doc: str, repeats: int) -> argparse.ArgumentParser:
    """The options of a part that measures the photographs several times."""
    options = parser(doc)
    options.add_argument("photos", type=Path)
    options.add_argument("--repeats", type=int, default=repeats)
    return options


def write_figures(folder: Path, part: str, **figures) -> None:
    """Leave a part's figures where the bench reads them."""
    (folder / f"{part}.json").write_text(json.dumps(figures))
