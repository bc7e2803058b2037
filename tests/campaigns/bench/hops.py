"""The seconds of a small collective by Gloo, which are hops from worker to worker.

horovodrun -np N python tests/campaigns/bench/hops.py FOLDER: bench.py starts it. A collective of
few bytes is two rings, Horovod's of what is ready and that of the sums. A ring has 2 (N - 1) hops, one
after another. One worker has none: its seconds are those that no hop explains (`scale.hop`).
"""

import statistics
import time

import torch

import setting
from job.cluster import comm
from job.cluster.objects import allgather

WARM = 20  # collectives before the first that counts


def measure(repeats: int) -> float:
    """Return the seconds of a sum of one number, the slowest worker's.

    A tenth of the sums take fewer: the others may have waited for a core that something else used.
    """
    took = []
    for _ in range(WARM + repeats):
        begun = time.perf_counter()
        comm.total(torch.ones(1), "hop")
        took.append(time.perf_counter() - begun)
    return max(allgather(statistics.quantiles(took[WARM:], n=10)[0], "hops"))


def main() -> None:
    parser = setting.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm.start()
    seconds = measure(options.repeats)
    if comm.rank() == 0:
        found = {f"hop_collective_{comm.size()}_s": seconds}
        setting.write_figures(options.folder, "hops", **found)


if __name__ == "__main__":
    main()
