"""Measure a refresh of the matching: the project's and the baseline's, on the same images.

bench.py starts it: horovodrun -np 2 python matching.py FOLDER PHOTOS. `refresh_over_baseline`
compares the work that grows with the images: reading, passes, costs, and sums over workers. With
20,000 images this is nearly all of a refresh. `refresh_with_solve_over_baseline` includes the
solve, which is a large fraction of both with the few images here.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import baseline
from job.cluster import comm
import job.distill.mgd
import setting
from job.cluster.objects import broadcast
from job.engine.run import Run
from job.build import build

FLOW = Path(__file__).with_name("flow.py")


class Solve:
    """Time `job.distill.mgd.assign`, which rank 0 calls once per stage."""

    def __init__(self):
        self.assign, self.seconds = job.distill.mgd.assign, 0.0
        job.distill.mgd.assign = self

    def __call__(self, *arguments):
        matching, seconds = setting.timed(lambda: self.assign(*arguments))
        self.seconds += seconds
        return matching

    def take(self) -> float:
        """Return the seconds since the last call. They are the same on all workers."""
        seconds, self.seconds = self.seconds, 0.0
        return broadcast(seconds)


def solve_arc_by_arc(costs: list[torch.Tensor], file: Path) -> float:
    """Return OR-Tools' seconds for all stages. They are the same on all workers."""
    seconds = 0.0
    if comm.rank() == 0:
        np.savez(file, *[cost.numpy() for cost in costs])
        done = subprocess.run(
            [sys.executable, FLOW, file], check=True, capture_output=True, text=True
        )
        seconds = json.loads(done.stdout)["seconds"]
    return broadcast(seconds)


def measure(
    training, plain: baseline.Baseline, paths: list[str], repeats: int, folder: Path
) -> dict:
    """Return medians of seconds, and ratios of the baseline's seconds to ours."""
    size, solve = training.config.image_size, Solve()
    networks, [distiller] = training.distillation.networks, training.distillation.distillers
    arc_by_arc = importlib.util.find_spec("ortools") is not None
    times = {name: [] for name in ("ours", "solve", "plain", "plain_solve")}
    for _ in range(repeats + 1):  # the first turn warms up
        comm.total(torch.ones(1), "barrier")
        total = setting.seconds(lambda: job.distill.mgd.prepare_refresh(distiller, 0, networks))
        times["solve"].append(solve.take())
        times["ours"].append(total - times["solve"][-1])
        comm.total(torch.ones(1), "barrier")
        costs, seconds = setting.timed(
            lambda: baseline.measure(plain.query, plain.teacher, paths, size)
        )
        times["plain"].append(seconds)
        times["plain_solve"].append(
            solve_arc_by_arc(costs, folder / "costs.npz") if arc_by_arc else 0.0
        )
    times = {name: values[1:] for name, values in times.items()}
    ours, plain = (
        [a + b for a, b in zip(times[of], times[by], strict=True)]
        for of, by in (("ours", "solve"), ("plain", "plain_solve"))
    )
    return {
        "refresh_over_baseline": setting.ratio(times["plain"], times["ours"]),
        "refresh_with_solve_over_baseline": setting.ratio(plain, ours) if arc_by_arc else None,
        "refresh_images": len(paths),
        "refresh_measure_s": statistics.median(times["ours"]),
        "solve_s": statistics.median(times["solve"]),
        "solve_arc_by_arc_s": statistics.median(times["plain_solve"]) if arc_by_arc else None,
    }


def main() -> None:
    options = setting.repeating(__doc__, repeats=3).parse_args()
    setting.pin()
    with Run(str(options.folder / "refresh"), 1) as run:
        paths = setting.photos(options.photos)
        training = build(
            setting.config(options.photos, len(paths), options.size, mgd_images=len(paths)), run
        )
        plain = baseline.Baseline(torch.load(options.photos / "teacher.pth"))
        figures = measure(training, plain, paths, options.repeats, options.folder)
        if run.rank == 0:
            setting.write_figures(options.folder, "matching", **figures)


if __name__ == "__main__":
    main()
