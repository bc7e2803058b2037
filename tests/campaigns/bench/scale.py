"""Model a step's bytes and seconds for 8 to 1024 workers: ours and the original program's.

    python tests/campaigns/bench/scale.py [options]

Bytes are those that a worker receives in a step. Seconds are the sum of computing, bytes over the
bandwidth, and a latency for each message of the rings. The model assumes no overlap. So
it overestimates both programs, and most the one that sends more. Loader processes read images
during the step. A column has the bytes/s that the storage must deliver. The constants are options.
Their defaults are the figures of results/latest.json if it has them.

The last table has only the waits for small messages, which depend on latency. A hop of Gloo was
measured between workers of one machine. Between nodes, add the network's latency (--hop). NCCL's
numbers are assumptions, because no GPU was available.

N workers, B images of a worker.
"""

import argparse
import json
import math
from pathlib import Path

WORKERS = [2**power for power in range(3, 11)]
LATEST = Path(__file__).parent / "results" / "latest.json"
PARAMETERS = 11_506_752  # trained: ResNet-18 with MoCo v2's head, and the distiller's batch norms
FLOAT, INTEGER = 4, 8  # bytes
BUCKETS = 6  # of ResNet-18's gradients, as job/engine/gradients.py divides them
COLLECTIVES = {"all": 96, "heads": 16}  # in a step of SimSiam's ResNet-18, by --sync-bn
HOPS = LATEST.with_name("2026-11-29-x86_64-2cores-hops.json")  # measured by the bench's part `hops`
# A step's collectives: key images, keys, buckets of gradients, scalars. The key images travel
# during the teacher's pass, and all buckets except the last during the backward pass. No pass hides
# the other three.
STEP, EXPOSED = BUCKETS + 3, 3
WAITS = {"workers": 8, "Gloo all": 10, "exposed": 9, "NCCL all": 10, " exposed": 9, "bytes": 8}
WAITS |= {"fraction": 9}
COLUMNS = [(10, 1), (9, 2), (9, 3), (12, 3)] * 2 + [(10, 1), (11, 2)]  # width, decimals


def shuffled(N: int, B: int, size: int) -> float:
    """Return the bytes of our key images.

    A worker encodes B images of one byte per value. Each is of another worker with probability
    (N - 1) / N.
    """
    return (N - 1) / N * B * 3 * size**2


def gathered(N: int, B: int, size: int) -> float:
    """Return the bytes of the original's key images.

    An allgather brings all other workers' (N - 1) B images as floats. A broadcast brings the
    permutation of the total batch, N B integers.
    """
    return (N - 1) * B * 3 * size**2 * FLOAT + (N - 1) / N * N * B * INTEGER


def keys(N: int, B: int, dim: int) -> float:
    """Return the bytes of an allgather of keys: (N - 1) B of the other workers."""
    return (N - 1) * B * dim * FLOAT


def gradients(N: int, parameters: int) -> float:
    """Return the bytes of a ring's allreduce.

    N - 1 messages add up and N - 1 messages distribute the sums, each with 1 / N of the gradients.
    """
    return 2 * (N - 1) / N * parameters * FLOAT


def ours(N: int, options) -> dict[str, float]:
    """Return the bytes of our step, by content."""
    images = shuffled(N, options.images, options.size)
    return {
        "images": images,
        "keys": keys(N, options.images, options.dim),
        "gradients": gradients(N, options.parameters),
    }


def original(N: int, options) -> dict[str, float]:
    """Return the bytes of the original's step, which gathers keys twice: for logits and queue."""
    images, received = gathered(N, options.images, options.size), ours(N, options)
    return received | {"images": images, "keys": 2 * received["keys"]}


def seconds(N: int, received: dict[str, float], options) -> float:
    """Return the seconds of a step that receives these bytes.

    Images and keys need N - 1 messages each, every bucket of gradients 2 (N - 1).
    """
    messages = (N - 1) * (2 + 2 * BUCKETS)
    return (
        options.images * options.seconds_per_image
        + sum(received.values()) / options.bandwidth
        + messages * options.latency
    )


def row(N: int, options) -> list[float]:
    """Return a row of the table: bytes in MB, seconds, efficiency, reading in GB/s.

    Efficiency is the fraction of the seconds in which the worker computes.
    """
    line, computing = [], options.images * options.seconds_per_image
    for program in (ours, original):
        received = program(N, options)
        step_seconds = seconds(N, received, options)
        line += [
            received["images"] / 1e6,
            received["keys"] / 1e6,
            step_seconds,
            computing / step_seconds,
        ]
    total_read = N * options.images * options.file_bytes
    return [
        *line,
        gradients(N, options.parameters) / 1e6,
        total_read / seconds(N, ours(N, options), options) / 1e9,
    ]


def table(options) -> None:
    """Print a row for each number of workers."""
    head = f"{'images MB':>10}{'keys MB':>9}{'step s':>9}{'efficiency':>12}"
    print(f"{'':8}{'ours':^{len(head)}}{'the original':^{len(head)}}{'both':>10}{'ours':>11}")
    print(f"{'workers':>8}{head}{head}{'grads MB':>10}{'read GB/s':>11}")
    for N in WORKERS:
        cells = [
            f"{value:{width}.{decimals}f}"
            for value, (width, decimals) in zip(row(N, options), COLUMNS, strict=True)
        ]
        print(f"{N:8}{''.join(cells)}")


def modelled(N: int, B: int, size: int, dim: int, parameters: int) -> dict[str, float]:
    """Return the modelled bytes of each figure that traffic.py counts."""
    images = {"shuffle": shuffled(N, B, size), "shuffle_baseline": gathered(N, B, size)}
    return images | {"keys": keys(N, B, dim), "gradients": gradients(N, parameters)}


def compare(figures: dict) -> None:
    """Print the bytes that traffic.py counted in real runs, and the model's."""
    for N in (2, 4):
        setting = (figures[f"traffic_{name}"] for name in ("images", "size", "dim", "parameters"))
        for name, model in modelled(N, *setting).items():
            counted, label = figures[f"{name}_bytes_{N}"] / 1e6, f"{name:18}{N} workers"
            print(f"  {label}: counted {counted:8.3f} MB, model {model / 1e6:8.3f} MB")


def norm_wait(N: int, collectives: int, latency: float) -> float:
    """Return the seconds of a step's collectives of batch norms, one after another.

    Each is two rings of few bytes: Horovod's negotiation, and the sums. A ring has 2 (N - 1)
    messages, one after another. On GPUs, NCCL's tree has fewer for the sums.
    """
    return collectives * 4 * (N - 1) * latency


def norm_table(options) -> None:
    """Print the seconds that synchronised batch norms add to a step of SimSiam."""
    print("SimSiam's ResNet-18: seconds that --sync-bn adds to a step, and their fraction of it")
    print(f"{'workers':>8}{'all s':>9}{'all':>8}{'heads s':>9}{'heads':>8}")
    for N in (8, 16, 32, 64):
        sums = gradients(N, options.parameters) / options.bandwidth
        step = options.images * options.seconds_per_image + sums
        waits = [norm_wait(N, count, options.latency) for count in COLLECTIVES.values()]
        print(f"{N:8}" + "".join(f"{wait:9.3f}{wait / (step + wait):8.0%}" for wait in waits))


def hop(N: int, seconds: float, fixed: float) -> float:
    """Return the seconds of a hop. A small collective has 4 (N - 1) of them.

    seconds: of the collective with N workers.
    fixed: of the collective with one worker, which has no hops.
    """
    return max(0.0, (seconds - fixed) / (4 * (N - 1)))


def gloo_wait(N: int, collectives: int, options) -> float:
    """Return the seconds of small collectives by Gloo: two rings of 2 (N - 1) hops each."""
    return collectives * (options.fixed + 4 * (N - 1) * options.hop)


def nccl_wait(N: int, collectives: int, options) -> float:
    """Return the seconds of small collectives by NCCL.

    Horovod negotiates by a ring of Gloo with 2 (N - 1) hops. The data need a launch and a tree, up
    and down, with 2 log2(N) hops of NCCL.
    """
    ready = options.fixed + 2 * (N - 1) * options.hop
    return collectives * (ready + options.nccl_launch + 2 * math.log2(N) * options.nccl_hop)


def wait_table(options) -> None:
    """Print the waits for collectives in a step of MoCo, by Gloo and by NCCL."""
    print(f"Small messages of a step of MoCo in ms: all {STEP} collectives, and the {EXPOSED} that")
    print("no pass hides (exposed). Gloo on CPUs, NCCL on GPUs. Then the last bucket's bytes by")
    print("NCCL, and the exposed fraction of a step on GPUs")
    print("".join(f"{title:>{width}}" for title, width in WAITS.items()))
    for N in (8, 16, 32, 64):
        print(wait_row(N, options))


def wait_row(N: int, options) -> str:
    """Return a row of the table of waits."""
    counts = (STEP, EXPOSED)
    waits = [wait(N, count, options) for wait in (gloo_wait, nccl_wait) for count in counts]
    last = gradients(N, options.parameters) / BUCKETS / options.nccl_bandwidth
    computing, exposed = options.images * options.gpu_seconds_per_image, waits[-1] + last
    pairs = zip([*waits, last], [*WAITS.values()][1:], strict=False)
    cells = "".join(f"{1e3 * value:{width}.2f}" for value, width in pairs)
    return f"{N:8}{cells}{exposed / (computing + exposed):9.0%}"


def measured_hop(figures: dict) -> dict:
    """Return the measured seconds of hops: of the latest results, or else of the first record."""
    return figures if "hop_s" in figures else json.loads(HOPS.read_text())


def measured_seconds(figures: dict) -> tuple[float, str]:
    """Return the seconds of computing for an image, and their source."""
    if "gpu_float32_seconds_per_image" in figures:
        return figures["gpu_float32_seconds_per_image"], "measured on a GPU"
    if "passes_bare_s" in figures:
        return figures["passes_bare_s"] / figures["passes_images"], "measured on a core"
    return 0.0025, "assumed for a GPU"


def main() -> None:
    figures = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    per_image, source = measured_seconds(figures)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        type=int,
        default=32,
        help="images of a worker in a step, B (default: the published recipe's on 8 workers)",
    )
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
    parser.add_argument("--dim", type=int, default=128, help="width of the keys")
    parser.add_argument("--parameters", type=int, default=PARAMETERS, help="trained ones")
    parser.add_argument(
        "--file-bytes", type=float, default=110e3, help="bytes of an image file; ImageNet's average"
    )
    parser.add_argument(
        "--seconds-per-image", type=float, default=per_image, help=f"computing ({source})"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=1.25e9, help="bytes/s that a worker receives; 10 Gbit/s"
    )
    parser.add_argument("--latency", type=float, default=50e-6, help="seconds of a message")
    hops = measured_hop(figures)
    defaults = {
        "hop": (hops["hop_s"], "seconds of a hop of Gloo (measured)"),
        "fixed": (hops["hop_fixed_s"], "seconds of a collective without its hops (measured)"),
        "nccl-launch": (20e-6, "seconds of a kernel's start (assumed)"),
        "nccl-hop": (5e-6, "seconds of a hop between nodes (assumed: InfiniBand)"),
        "nccl-bandwidth": (20e9, "bytes/s (assumed: 200 Gbit/s)"),
        "gpu-seconds-per-image": (1 / 2100, "computing (assumed: an A100 in bf16)"),
    }
    for name, (default, about) in defaults.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=about)
    options = parser.parse_args()
    if options.seconds_per_image != per_image:
        source = "given"
    computing = f"{options.seconds_per_image:.4f} s of computing each ({source})"
    print(f"{options.images} images of {options.size} pixels per worker and step, {computing},")
    bandwidth, latency = options.bandwidth / 1e9, options.latency * 1e6
    print(f"{bandwidth:g} GB/s received, {latency:g} us per message; nothing overlaps\n")
    table(options)
    print()
    norm_table(options)
    hop_us, fixed = 1e6 * options.hop, 1e6 * options.fixed
    print(
        f"\nA hop of Gloo needs {hop_us:.0f} us. A collective needs {fixed:.0f} us plus its hops."
    )
    wait_table(options)
    if "traffic_images" in figures:
        print(f"\nbytes counted in real runs, from {LATEST.name}:")
        compare(figures)


if __name__ == "__main__":
    main()
