"""Measure a scan of many files, and the memory that loader processes need for their names.

bench.py starts it: python scanning.py FOLDER PHOTOS --files 100000 1281167. The files are in 1,000
class folders, which stay in FOLDER. A class's files are hard links to one photograph. Seconds are
medians, of the clock and of the CPU. A plain walk by os.scandir is measured for comparison.
`first_batch_s` is the time from the scan's end to the first batch of two loader processes.
`loader_bytes` is the private memory of one loader process, without the memory that it shares with
its worker.
"""

import os
import shutil
import statistics
import time
from pathlib import Path

import psutil

import setting
from job.cluster.children import end_children
from job.data.augment import RandomView
from job.data.folders import TrainingOrder, scan
from job.data.loader import Batches
from job.data.views import RandomViews

CLASSES, BATCH, PROCESSES = 1000, 64, 2


def links(folder: Path, photo: str, files: int) -> Path:
    """Return a folder with `files` files in train/<class>/, which other parts use too.

    A class's files link to one copy of `photo`.
    """
    root = folder / f"links{files}"
    if root.exists():
        return root
    for label in range(CLASSES):
        own = root / "train" / f"n{label:08d}"
        own.mkdir(parents=True)
        names = [f"{own}/n{label:08d}_{number}.JPEG" for number in range(label, files, CLASSES)]
        shutil.copy(photo, names[0])
        for name in names[1:]:
            os.link(names[0], name)
    return root


def walk(folder: str) -> int:
    """Return the number of files below a folder, by the system's calls only."""
    with os.scandir(folder) as entries:
        return sum(walk(entry.path) if entry.is_dir() else 1 for entry in entries)


def timed(task, *arguments) -> tuple:
    """Return a task's seconds, its CPU seconds, and its result."""
    start, used = time.perf_counter(), time.process_time()
    result = task(*arguments)
    return time.perf_counter() - start, time.process_time() - used, result


def own_memory(pid: int) -> int:
    """Return the bytes of a process's private memory.

    It excludes shared memory. The kernel counts those pages as private until another process maps
    them.
    """
    regions = psutil.Process(pid).memory_maps()
    return sum(
        r.private_clean + r.private_dirty for r in regions if not r.path.startswith("/memfd:")
    )


def first_batch(images) -> tuple[float, float]:
    """Return the seconds until the first batch, and the mean private memory of a loader process."""
    start = time.perf_counter()
    views = RandomViews(images, RandomView(64, aug_plus=True), 2, seed=0)
    batches = Batches(views, TrainingOrder(images, BATCH, 0, 1, 0, 1), PROCESSES)
    next(batches)
    seconds = time.perf_counter() - start
    held = [own_memory(process.pid) for process in batches.processes]
    end_children()
    return seconds, statistics.mean(held)


def measure(folder: Path, photo: str, files: list[int], repeats: int) -> dict:
    """Return the figures of each number of files."""
    figures: dict[str, float] = {}
    for count in files:
        root = links(folder, photo, count)
        walks, scans, used = [], [], []
        for _ in range(repeats):
            walks.append(timed(walk, str(root))[0])
            seconds, cpu, images = timed(scan, str(root), "train")
            scans.append(seconds)
            used.append(cpu)
        assert len(images) == count
        seconds, held = first_batch(images)
        figures |= {
            f"walk_{count}_s": statistics.median(walks),
            f"scan_{count}_s": statistics.median(scans),
        }
        figures |= {f"scan_{count}_cpu_s": statistics.median(used)}
        figures |= {f"first_batch_{count}_s": seconds, f"loader_{count}_bytes": held}
    few, many = files[0], files[-1]
    return figures | {
        "loader_growth": figures[f"loader_{many}_bytes"] / figures[f"loader_{few}_bytes"]
    }


def main() -> None:
    parser = setting.repeating(__doc__, repeats=3)
    parser.add_argument("--files", type=int, nargs="+", default=[100_000, 1_281_167])
    options = parser.parse_args()
    photo = setting.photos(options.photos)[0]
    figures = measure(options.folder, photo, options.files, options.repeats)
    setting.write_figures(options.folder, "scanning", **figures)


if __name__ == "__main__":
    main()
