"""How long a scan of many files takes, and what the loader processes hold of its names.

python tests/campaigns/bench/scanning.py FOLDER PHOTOS --files 100000 1281167: bench.py starts it. The files, in
1,000 class folders, are hard links to one photograph a class. Seconds are medians, by the clock and of a processor. A
walk alone, by os.scandir, stands beside the scan. `first_batch_s` is the time from the scan's end to the first batch
of two loader processes. `loader_bytes` is the private memory of one of them, without what it shares with its worker.
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


def write_links(root: Path, photo: Path, files: int) -> None:
    """Fill root/train/<class>/ with so many files, those of a class links to one copy of `photo`."""
    for label in range(CLASSES):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        names = [f"{folder}/n{label:08d}_{number}.JPEG" for number in range(label, files, CLASSES)]
        shutil.copy(photo, names[0])
        for name in names[1:]:
            os.link(names[0], name)


def walk(folder: str) -> int:
    """Return the number of files below a folder, by the system's calls alone."""
    with os.scandir(folder) as entries:
        return sum(walk(entry.path) if entry.is_dir() else 1 for entry in entries)


def timed(task, *arguments) -> tuple:
    """Return the seconds that a task takes, those of a processor, and its result."""
    begun, used = time.perf_counter(), time.process_time()
    result = task(*arguments)
    return time.perf_counter() - begun, time.process_time() - used, result


def own_memory(pid: int) -> int:
    """Return the bytes of a process's private memory.

    Pages of shared memory that no other process has mapped yet count as private for the kernel, but
    all processes have the same. So they are left out.
    """
    regions = psutil.Process(pid).memory_maps()
    return sum(
        r.private_clean + r.private_dirty for r in regions if not r.path.startswith("/memfd:")
    )


def first_batch(images) -> tuple[float, float]:
    """Return the seconds until the first batch, and the mean private memory of a loader process."""
    begun = time.perf_counter()
    views = RandomViews(images, RandomView(64, aug_plus=True), 2, seed=0)
    batches = Batches(views, TrainingOrder(images, BATCH, 0, 1, 0, 1), PROCESSES)
    next(batches)
    seconds = time.perf_counter() - begun
    held = [own_memory(process.pid) for process in batches.processes]
    end_children()
    return seconds, statistics.mean(held)


def measure(folder: Path, photo: Path, files: list[int], repeats: int) -> dict:
    """Return the figures of each number of files."""
    figures: dict[str, float] = {}
    for count in files:
        root = folder / f"links{count}"
        try:
            write_links(root, photo, count)
            walks, scans, used = [], [], []
            for _ in range(repeats):
                walks.append(timed(walk, str(root))[0])
                seconds, cpu, images = timed(scan, str(root), "train")
                scans.append(seconds)
                used.append(cpu)
            assert len(images) == count
            seconds, held = first_batch(images)
        finally:
            shutil.rmtree(root, ignore_errors=True)
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
