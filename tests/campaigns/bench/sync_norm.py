"""Measure SimSiam's step with --sync-bn all, heads and none, in turns on the same images.

bench.py starts it: horovodrun -np 2 python sync_norm.py FOLDER PHOTOS. There is no teacher, so the
fraction of synchronised batch norm is the highest. The probe is the same collective on idle
workers. Its seconds include no wait for a slower worker.
"""

import statistics

import torch

import setting
from job.cluster import comm
from job.engine.run import Run
from job.frameworks.simsiam import SYNCHRONISED
from single_steps import Steps

# The published preset's options, with the bench's network and images.
SIMSIAM = dict(framework="simsiam", teacher="", zero_init_residual=True, fix_pred_lr=True, lr=0.01)
PROBES = 50  # collectives per turn
CHANNELS = 256  # of the probe's batch norm


def count_collectives(steps: Steps) -> int:
    """Do a step. Return the number of its batch norms' collectives."""
    names, total = [], comm.total
    comm.total = lambda tensor, name: (names.append(name), total(tensor, name))[1]
    steps.seconds()
    comm.total = total
    return sum(name.startswith("norm.") for name in names)


def probe() -> float:
    """Return the seconds of a batch norm's collective on idle workers."""
    sums = torch.ones(2 * CHANNELS + 1, dtype=torch.float64)
    times = [setting.seconds(lambda: comm.total(sums, "probe")) for _ in range(PROBES)]
    return statistics.median(times)


def measure(trainings: dict[str, Steps], repeats: int) -> dict[str, float]:
    """Return fractions of a step, and medians of seconds."""
    # This warms up too.
    counts = {name: count_collectives(steps) for name, steps in trainings.items()}
    times, probed = {name: [] for name in trainings}, []
    for _ in range(repeats):
        for name, steps in trainings.items():
            times[name].append(steps.seconds())
        probed.append(probe())
    figures = {"sync_norm_collective_s": statistics.median(probed)}
    for name in ("all", "heads"):
        over = setting.ratio(times["none"], times[name])
        figures[f"sync_norm_{name}_share"] = 1 - over
        figures[f"sync_norm_{name}_collectives"] = counts[name]
    return figures | {f"sync_norm_{name}_step_s": statistics.median(times[name]) for name in times}


def main() -> None:
    options = setting.repeating(__doc__, repeats=10).parse_args()
    setting.pin()
    with Run(str(options.folder / "sync_norm"), 1) as run:
        trainings = {
            name: Steps(options, run, setting.BATCH, **SIMSIAM, sync_bn=name)
            for name in SYNCHRONISED
        }
        figures = measure(trainings, options.repeats)
        if run.rank == 0:
            setting.write_figures(options.folder, "sync_norm", **figures)


if __name__ == "__main__":
    main()
