"""Profile a step on the GPU: waits of the host, kernels, and images/s, at two batch sizes.

python tests/gpu/profiling.py FOLDER {cuda,cpu} [--ways ...]. For each way and batch, measure the
steps' images/s, the host's waits in a step with their lines (torch.cuda.set_sync_debug_mode), and
the operations that use most of the GPU's time (torch.profiler). Append each result to the file in
GPU_RESULTS. On the CPU it is a dry run with tiny images, which counts no waits.
"""

import argparse
import collections
import json
import os
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from job.engine.run import Run
from steps import build_training, save_teacher, train

REPO = Path(__file__).parents[2]
BATCHES = {"cuda": (32, 128), "cpu": (4, 8)}  # images a step
SIZE = {"cuda": 224, "cpu": 32}  # pixels
WIDTH = {"cuda": 64, "cpu": 16}
STEPS = {"cuda": 20, "cpu": 2}
WARM = {"cuda": 5, "cpu": 1}
# Compiling needs about a minute, so only the larger batch is compiled.
WAYS = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "bf16 compiled": {"precision": "bf16", "compile": True},
}
TOP = 12  # operations shown


def record(**fields) -> None:
    """Print a result, and append it to the session's results."""
    line = json.dumps({"kind": "profile", "time": time.time(), **fields})
    print(line, flush=True)
    if path := os.environ.get("GPU_RESULTS"):
        with open(path, "a") as file:
            file.write(line + "\n")


class Steps:
    """Steps of ResNet-18 with MGD from a ResNet-50, on views that are already on the device."""

    def __init__(self, run: Run, folder: Path, device: str, batch: int, options: dict):
        size, width = SIZE[device], WIDTH[device]
        self.batch, self.device = batch, device
        save_teacher(folder / "teacher.pth", width)
        options = {"teacher": str(folder / "teacher.pth"), "width": width, **options}
        options |= {"image_size": size, "batch_size": batch, "aug_plus": True, "moco_k": 65536}
        options |= {"loss_share": 0.0, "loss_factor": 1e4}
        self.training = build_training(run, folder / f"images{batch}", **options)
        views = [torch.randint(256, (batch, 3, size, size), dtype=torch.uint8) for _ in range(2)]
        self.views = [view.to(run.device) for view in views]

    def __call__(self, steps: int) -> None:
        """Run some steps, and wait for the device."""
        train(self.training, [self.views] * steps)
        if self.device == "cuda":
            torch.cuda.synchronize()


def speed(steps: Steps, count: int) -> float:
    """Return images/s, the median of three rounds."""
    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        steps(count)
        speeds.append(count * steps.batch / (time.perf_counter() - start))
    return statistics.median(speeds)


def waits(steps: Steps, count: int) -> dict[str, float]:
    """Return the waits for the GPU in a step, by file and line of the program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(steps.training, [steps.views] * count)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return count_waits(caught, count)


def count_waits(caught: list[warnings.WarningMessage], steps: int) -> dict[str, float]:
    """Return torch's warnings of a wait, per step, by file and line."""
    waiting = [warning for warning in caught if "synchronizing" in str(warning.message)]
    lines = [(os.path.relpath(warning.filename, REPO), warning.lineno) for warning in waiting]
    counts = collections.Counter(f"{path}:{line}" for path, line in lines)
    return {line: round(number / steps, 2) for line, number in counts.most_common()}


def busiest(steps: Steps, count: int) -> tuple[float, list[str]]:
    """Return the fraction of the steps' time in which the device is busy, and its operations."""
    activities = [ProfilerActivity.CPU]
    if steps.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    start = time.perf_counter()
    with profile(activities=activities) as seen:
        steps(count)
    seconds = time.perf_counter() - start
    averages = seen.key_averages()
    on_gpu = sum(event.self_device_time_total for event in averages) / 1e6  # s
    order = "self_cuda_time_total" if steps.device == "cuda" else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=TOP, max_name_column_width=60)
    return on_gpu / seconds, table.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    device = options.device
    with Run(str(options.folder / "run"), keep=1) as run:
        assert run.device.type == device, run.device
        for way in options.ways:
            compiled = WAYS[way].get("compile")
            for batch in BATCHES[device][-1 if compiled else 0 :]:
                folder = options.folder / way
                folder.mkdir(parents=True, exist_ok=True)
                steps = Steps(run, folder, device, batch, WAYS[way])
                steps(WARM[device])
                fields = {"way": way, "images": batch, "images_per_s": speed(steps, STEPS[device])}
                if device == "cuda":
                    fields["waits_a_step"] = waits(steps, STEPS[device])
                    fields["memory_bytes"] = torch.cuda.max_memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                record(**fields)
                busy, table = busiest(steps, STEPS[device])
                record(way=way, images=batch, busy_share=round(busy, 3))
                print("\n".join(table), flush=True)
                del steps


if __name__ == "__main__":
    main()
