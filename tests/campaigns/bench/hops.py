"""Measure the seconds of a small collective by Gloo, which are hops from worker to worker.

bench.py starts it: horovodrun -np N python hops.py FOLDER. A collective of few bytes is two rings:
Horovod's negotiation, and the sums. A ring has 2 (N - 1) hops, one after another. With one worker
there are no hops. Its seconds are the fixed cost of a collective (`scale.hop`).
"""

import statistics
import time

import torch

import setting
from job.cluster import comm
from job.cluster.objects import allgather

WARM = 20  # collectives to warm up


def measure(repeats: int) -> float:
    """Return the slowest worker's seconds of the sum of one number.

    They are the first decile, because slower sums may have waited for a busy core.
    """
    times = []
    for _ in range(WARM + repeats):
        start = time.perf_counter()
        comm.total(torch.ones(1), "hop")
        times.append(time.perf_counter() - start)
    return max(allgather(statistics.quantiles(times[WARM:], n=10)[0], "hops"))


def main() -> None:
    parser = setting.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm.start()
    seconds = measure(options.repeats)
    if comm.rank() == 0:
        figures = {f"hop_collective_{comm.size()}_s": seconds}
        setting.write_figures(options.folder, "hops", **figures)


if __name__ == "__main__":
    main()
