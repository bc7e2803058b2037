"""The bench's setting: photographs, teacher, pinned cores, options and files of figures."""

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

BATCH = 32  # images of a step on the CPU, over both workers
PHOTOS = 2 * BATCH  # in the folder of the step and the refresh
PHOTO_SIZE = (500, 375)  # pixels, about ImageNet's average


def write_photos(folder: Path, images: int, sides: tuple[int, int] = PHOTO_SIZE) -> None:
    """Write JPEGs with the spectrum of photographs: the same ones to train/ and to val/."""
    generator = np.random.default_rng(0)
    for number in range(images):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize(sides, Image.Resampling.BICUBIC), dtype=np.int16
        )
        noisy = (smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        for split in ("train", "val"):
            path = folder / split / str(number % 4) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).save(path, quality=90)


def write_teacher(folder: Path) -> None:
    """Write a ResNet-50 with random weights in the layout of torchvision's files."""
    torch.manual_seed(5)
    torch.save(build_resnet("resnet50", dim=1000).state_dict(), folder / "teacher.pth")


def photos(folder: Path) -> list[str]:
    """Return the paths of the training photographs."""
    return sorted(str(path) for path in (folder / "train").rglob("*.jpg"))


def config(folder: Path, images: int, size: int, **options) -> Config:
    """Return the options of the step: ResNet-18 from ResNet-50 by the published recipe.

    images: of the total batch. size: of the views in pixels. The worker reads images itself. So no
    cost of a step is hidden in another process, and no process of a job runs in another job's turn.
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
    """Bind this worker to one thread on one core: `core` plus its local rank."""
    os.sched_setaffinity(0, {core + int(os.environ.get("HOROVOD_LOCAL_RANK", 0))})
    torch.set_num_threads(1)


def timed(work) -> tuple:
    """Return the result of `work()` and its seconds, including those of the GPU."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def seconds(work) -> float:
    """Return the seconds of `work()`."""
    return timed(work)[1]


def cpu_seconds(work) -> float:
    """Return the seconds that all threads of this process compute in `work()`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(tasks: dict, repeats: int, clock=seconds) -> dict[str, list[float]]:
    """Return the seconds of each task by `clock`.

    All are done in turn `repeats` times, after a warm-up.
    """
    times = {name: [] for name in tasks}
    for _ in range(repeats + 1):
        for name, work in tasks.items():
            times[name].append(clock(work))
    return {name: values[1:] for name, values in times.items()}


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the turns' ratios. Both sides of a turn are measured within a minute."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def parser(doc: str) -> argparse.ArgumentParser:
    """Return the options of every part: the folder of its figures, and the side of its views."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", type=Path)
    options.add_argument("--size", type=int, default=224)
    return options


def repeating(doc: str, repeats: int) -> argparse.ArgumentParser:
    """Return the options of a part that measures the photographs several times."""
    options = parser(doc)
    options.add_argument("photos", type=Path)
    options.add_argument("--repeats", type=int, default=repeats)
    return options


def write_figures(folder: Path, part: str, **figures) -> None:
    """Write a part's figures to the file that the bench reads."""
    (folder / f"{part}.json").write_text(json.dumps(figures))
