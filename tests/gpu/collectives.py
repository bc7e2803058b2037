"""Compare each collective of the program, by dtype, with its exact expected result.

test_collectives.py starts horovodrun -np N python tests/gpu/collectives.py {cuda,cpu}. Rank 0
prints a JSON line for each collective and dtype. `--share` puts all workers on the first GPU.

N: workers, n: rows.
"""

import argparse
import json
import os
import sys

import torch

from job.cluster import comm
from job.cluster.objects import allgather

# The program's collectives, and the dtypes for which it uses them on any device.
USED = {
    "sum": (torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
    "total": (torch.int32, torch.int64, torch.float32, torch.float64),
    "highest": (torch.int64,),
    "gather": (torch.uint8, torch.int64, torch.float32, torch.float64),
    "exchange": (torch.uint8, torch.int64, torch.float32),
    "broadcast": (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64),
}
SIZES = (1, 1000, 100_000)  # values


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a worker's values, (size,): small integers, whose sums are exact in any dtype."""
    return (torch.arange(size) % 7 + rank).to(dtype)


def rows(rank: int, to: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows, (n, 3), that a worker sends to another: 0, 1 or 2 rows."""
    count = (rank + 2 * to) % 3
    return (torch.arange(3 * count).view(count, 3) % 7 + rank).to(dtype)


def result(name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the result of a collective on this worker."""
    rank, label = comm.rank(), f"{name}.{dtype}.{size}"
    mine = values(rank, size, dtype).to(device)
    if name == "sum":
        return comm.wait(comm.begin_sum_(mine, label))
    if name == "total":
        return comm.total(mine, label)
    if name == "highest":
        return comm.highest(mine, label)
    if name == "gather":
        return comm.gather(mine.repeat(rank + 1), label)
    if name == "exchange":
        parts = [rows(rank, to, dtype) for to in range(comm.size())]
        return comm.exchange(torch.cat(parts).to(device), [len(part) for part in parts], label)
    given = {f"{label}.state": mine.clone()}
    comm.broadcast_(given)
    return torch.stack([comm.broadcast(mine, label), *given.values()])


def expected(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the expected result of a collective on this worker."""
    N, rank = comm.size(), comm.rank()
    every = torch.stack([values(worker, size, torch.float64) for worker in range(N)])  # (N, size)
    if name in ("sum", "total"):
        return every.sum(0).to(dtype)
    if name == "highest":
        return every.max(0).values.to(dtype)
    if name == "gather":
        return torch.cat([values(worker, size, dtype).repeat(worker + 1) for worker in range(N)])
    if name == "exchange":
        return torch.cat([rows(worker, rank, dtype) for worker in range(N)])
    return torch.stack([values(0, size, dtype)] * 2)


def right(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a collective is correct on the device, for all sizes."""
    for size in SIZES:
        actual, target = result(name, size, dtype, device), expected(name, size, dtype)
        same_kind = actual.device == device and actual.dtype == dtype
        if not same_kind or not torch.equal(actual.cpu(), target):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--share", action="store_true", help="all workers use the first GPU")
    options = parser.parse_args()
    # The settings of job/cluster/launch.py.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "50")
    if options.device == "cuda":
        os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
    comm.start()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", 0 if options.share else comm.local_rank())
        torch.cuda.set_device(device)
    wrong = 0
    for name, dtypes in USED.items():
        for dtype in dtypes:
            correct = allgather(right(name, dtype, device), "found")  # by rank
            wrong += not all(correct)
            if comm.rank() == 0:
                line = {"collective": name, "dtype": str(dtype), "right": correct}
                print(json.dumps(line), flush=True)
    comm.stop()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
