"""Count the bytes that a worker receives in a step, by the kernel's counters.

bench.py starts it: horovodrun -np N python traffic.py FOLDER. The kernel counts the received bytes
of each TCP connection. `count` compares their sum over the process's connections before and after
the work.
"""

import os
import socket
import stat
import statistics
import struct

import torch

import baseline
import scale
import setting
from job.cluster import comm
from job.cluster.objects import allgather
from moco.shuffle import Shuffle

BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in linux/tcp.h's struct tcp_info
DIM = 128  # width of the keys


def received() -> int:
    """Return the bytes received so far on this process's TCP connections."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (
                    socket.AF_INET,
                    socket.AF_INET6,
                ):
                    info = connection.getsockopt(
                        socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_RECEIVED + 8
                    )
                    total += struct.unpack_from("Q", info, BYTES_RECEIVED)[0]
        except OSError:
            continue  # the descriptor of the listing, closed by now
    return total


def count(work, repeats: int) -> float:
    """Return the mean bytes that this worker receives in a call of `work(repeat)`."""
    comm.total(torch.ones(1), "barrier")
    before = received()
    for repeat in range(repeats):
        work(repeat)
    comm.total(torch.ones(1), "barrier")
    return (received() - before) / repeats


def measure(B: int, size: int, parameters: int, repeats: int) -> dict[str, float]:
    """Return the bytes that a worker receives per step.

    They are of key images, of keys and of gradients. Key images are counted for our shuffle, as
    bytes and as floats, and for the baseline's. B: images of a worker.
    """
    images = torch.randint(256, (B, 3, size, size), dtype=torch.uint8)
    floats, keys, gradients = images.float(), torch.zeros(B, DIM), torch.zeros(parameters)
    generator = torch.Generator().manual_seed(0)
    permutations = [torch.randperm(B * comm.size(), generator=generator) for _ in range(repeats)]
    counted = {
        "shuffle": lambda i: comm.wait(Shuffle(comm, permutations[i]).send(images)),
        "shuffle_float": lambda i: comm.wait(Shuffle(comm, permutations[i]).send(floats)),
        "shuffle_baseline": lambda i: baseline.shuffle(floats),
        "keys": lambda i: comm.wait(Shuffle(comm, permutations[i]).spread(keys)),
        "gradients": lambda i: comm.wait(comm.begin_sum_(gradients, "gradients")),
    }
    mine = {name: count(work, repeats) for name, work in counted.items()}
    workers = allgather(mine, "counts")
    figures = {
        f"{name}_bytes_{comm.size()}": statistics.mean(worker[name] for worker in workers)
        for name in mine
    }
    return figures | {
        "traffic_images": B,
        "traffic_size": size,
        "traffic_dim": DIM,
        "traffic_parameters": parameters,
    }


def main() -> None:
    parser = setting.parser(__doc__)
    parser.add_argument("--images-per-worker", type=int, default=16)
    parser.add_argument("--parameters", type=int, default=scale.PARAMETERS, help="trained ones")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm.start()
    figures = measure(options.images_per_worker, options.size, options.parameters, options.repeats)
    if comm.rank() == 0:
        setting.write_figures(options.folder, "traffic", **figures)


if __name__ == "__main__":
    main()
