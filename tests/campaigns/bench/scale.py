"""What a step costs as workers are added: a model of its bytes and seconds, ours beside the original's.

python tests/campaigns/bench/scale.py [options]. Bytes are those that a worker receives in a step. Seconds are what it computes,
then its bytes over the bandwidth and a latency for each message of the rings: as if nothing overlapped, which makes both ways
look slower than they are, and the one that sends more the most. Images are read meanwhile by loader processes; what the
storage must give is a column. The constants are options; what results/latest.json has measured is taken from there.

The last table has the waits for small messages alone, which bandwidth does not explain. A hop of
Gloo was measured between workers of one machine; between nodes it is longer by the network's
latency (--hop). NCCL's numbers are assumptions, as no GPU was there.
"""

import argparse
import json
import math
from pathlib import Path

WORKERS = [2**power for power in range(3, 11)]
LATEST = Path(__file__).parent / "results" / "latest.json"
PARAMETERS = 11_506_752  # trained: ResNet-18 with MoCo v2's head, and the distiller's batch norms
FLOAT, INTEGER = 4, 8  # bytes
BUCKETS = 6  # gradients are summed in so many parts: of ResNet-18, by job/engine/gradients.py
COLLECTIVES = {"all": 96, "heads": 16}  # a step of SimSiam's ResNet-18, by --sync-bn
HOPS = LATEST.with_name("2026-11-29-x86_64-2cores-hops.json")  # measured by the bench's part `hops`
# A step's collectives: key images, keys, buckets of gradients, scalars. The key images travel
# during the teacher's pass, and all buckets except the last during the backward pass. No pass hides
# the other three.
STEP, EXPOSED = BUCKETS + 3, 3
WAITS = {"workers": 8, "Gloo all": 10, "exposed": 9, "NCCL all": 10, " exposed": 9, "bytes": 8}
WAITS |= {"share": 8}
COLUMNS = [(10, 1), (9, 2), (9, 3), (12, 3)] * 2 + [
    (10, 1),
    (11, 2),
]  # width, places after the point


def shuffled(N: int, B: int, size: int) -> float:
    """Our key images: a worker encodes B, as bytes, of which each is another's with probability (N - 1) / N."""
    return (N - 1) / N * B * 3 * size**2


def gathered(N: int, B: int, size: int) -> float:
    """The original's: an allgather of all other workers' as floats, (N - 1) B, and the permutation of the total batch, N B."""
    return (N - 1) * B * 3 * size**2 * FLOAT + (N - 1) / N * N * B * INTEGER


def keys(N: int, B: int, dim: int) -> float:
    """An allgather of keys: the (N - 1) B of all other workers."""
    return (N - 1) * B * dim * FLOAT


def gradients(N: int, parameters: int) -> float:
    """A ring's allreduce: 1 / N of all in each of N - 1 messages that sum up, and of N - 1 that hand round."""
    return 2 * (N - 1) / N * parameters * FLOAT


def ours(N: int, options) -> dict[str, float]:
    """The bytes of our step."""
    images = shuffled(N, options.images, options.size)
    return {
        "images": images,
        "keys": keys(N, options.images, options.dim),
        "gradients": gradients(N, options.parameters),
    }


def original(N: int, options) -> dict[str, float]:
    """The bytes of the original's: its keys are gathered twice, for the logits and for the queue."""
    images, found = gathered(N, options.images, options.size), ours(N, options)
    return found | {"images": images, "keys": 2 * found["keys"]}


def seconds(N: int, received: dict[str, float], options) -> float:
    """B images in the networks, bytes over the bandwidth; N - 1 messages for images and for keys, twice as many a bucket."""
    messages = (N - 1) * (2 + 2 * BUCKETS)
    return (
        options.images * options.seconds_per_image
        + sum(received.values()) / options.bandwidth
        + messages * options.latency
    )


def row(N: int, options) -> list[float]:
    """A line of the table: bytes in MB; seconds; efficiency, which is the computing's share of them; reading in GB/s."""
    line, alone = [], options.images * options.seconds_per_image
    for way in (ours, original):
        received = way(N, options)
        took = seconds(N, received, options)
        line += [received["images"] / 1e6, received["keys"] / 1e6, took, alone / took]
    total_read = N * options.images * options.file_bytes
    return [
        *line,
        gradients(N, options.parameters) / 1e6,
        total_read / seconds(N, ours(N, options), options) / 1e9,
    ]


def table(options) -> None:
    """Print a line for each number of workers."""
    way = f"{'images MB':>10}{'keys MB':>9}{'step s':>9}{'efficiency':>12}"
    print(f"{'':8}{'ours':^{len(way)}}{'the original':^{len(way)}}{'both':>10}{'ours':>11}")
    print(f"{'workers':>8}{way}{way}{'grads MB':>10}{'read GB/s':>11}")
    for N in WORKERS:
        cells = [
            f"{value:{width}.{places}f}"
            for value, (width, places) in zip(row(N, options), COLUMNS, strict=True)
        ]
        print(f"{N:8}{''.join(cells)}")


def modelled(N: int, B: int, size: int, dim: int, parameters: int) -> dict[str, float]:
    """The bytes of all that traffic.py counts, under its names."""
    images = {"shuffle": shuffled(N, B, size), "shuffle_baseline": gathered(N, B, size)}
    return images | {"keys": keys(N, B, dim), "gradients": gradients(N, parameters)}


def compare(found: dict) -> None:
    """Print what traffic.py counted in real runs beside the model."""
    for N in (2, 4):
        setting = (found[f"traffic_{name}"] for name in ("images", "size", "dim", "parameters"))
        for name, model in modelled(N, *setting).items():
            counted = found[f"{name}_bytes_{N}"]
            print(
                f"  {name:18}{N} workers: counted {counted / 1e6:8.3f} MB, model {model / 1e6:8.3f} MB"
            )


def norm_wait(N: int, collectives: int, latency: float) -> float:
    """Return the seconds of a step's collectives of batch norms, one after another.

    Each is two rings of few bytes: Horovod's, of what is ready, and that of the sums. A ring has
    2 (N - 1) messages, one after another. NCCL's tree, on GPUs, has fewer in the second.
    """
    return collectives * 4 * (N - 1) * latency


def norm_table(options) -> None:
    """Print what synchronised batch norms add to a step of SimSiam, and their share of it."""
    print("SimSiam's ResNet-18: seconds that --sync-bn adds to a step, and their share of it")
    print(f"{'workers':>8}{'all s':>9}{'share':>8}{'heads s':>9}{'share':>8}")
    for N in (8, 16, 32, 64):
        sums = gradients(N, options.parameters) / options.bandwidth
        step = options.images * options.seconds_per_image + sums
        waits = [norm_wait(N, count, options.latency) for count in COLLECTIVES.values()]
        print(f"{N:8}" + "".join(f"{wait:9.3f}{wait / (step + wait):8.0%}" for wait in waits))


def hop(N: int, seconds: float, alone: float) -> float:
    """Return the seconds of a hop, of 4 (N - 1) in a small collective.

    seconds: of the collective with N workers. alone: with one, which has no hops.
    """
    return max(0.0, (seconds - alone) / (4 * (N - 1)))


def gloo_wait(N: int, collectives: int, options) -> float:
    """Return the seconds of small collectives by Gloo: two rings of 2 (N - 1) hops each."""
    return collectives * (options.fixed + 4 * (N - 1) * options.hop)


def nccl_wait(N: int, collectives: int, options) -> float:
    """Return the seconds of small collectives by NCCL.

    Horovod's ring of what is ready is Gloo's, of 2 (N - 1) hops. The data take a launch, and a tree
    up and down: 2 log2(N) hops of NCCL.
    """
    ready = options.fixed + 2 * (N - 1) * options.hop
    return collectives * (ready + options.nccl_launch + 2 * math.log2(N) * options.nccl_hop)


def wait_table(options) -> None:
    """Print what a step of MoCo waits for collectives, by Gloo and by NCCL."""
    print(f"Small messages of a step of MoCo, ms: all {STEP} collectives, and {EXPOSED} that no")
    print(
        "pass hides. By Gloo on CPUs, by NCCL on GPUs; the last bucket's bytes by NCCL; their share"
    )
    print("of a step on GPUs")
    print("".join(f"{title:>{width}}" for title, width in WAITS.items()))
    for N in (8, 16, 32, 64):
        print(wait_row(N, options))


def wait_row(N: int, options) -> str:
    """Return a line of the table of waits."""
    counts = (STEP, EXPOSED)
    waits = [wait(N, count, options) for wait in (gloo_wait, nccl_wait) for count in counts]
    last = gradients(N, options.parameters) / BUCKETS / options.nccl_bandwidth
    computing, exposed = options.images * options.gpu_seconds_per_image, waits[-1] + last
    pairs = zip([*waits, last], [*WAITS.values()][1:], strict=False)
    cells = "".join(f"{1e3 * value:{width}.2f}" for value, width in pairs)
    return f"{N:8}{cells}{exposed / (computing + exposed):8.0%}"


def measured_hop(found: dict) -> dict:
    """Return the measured seconds of hops, of the newest results or of their first day."""
    return found if "hop_s" in found else json.loads(HOPS.read_text())


def measured_seconds(found: dict) -> tuple[float, str]:
    """Seconds that a worker computes for an image, and where they are from."""
    if "gpu_float32_seconds_per_image" in found:
        return found["gpu_float32_seconds_per_image"], "measured on a GPU"
    if "passes_bare_s" in found:
        return found["passes_bare_s"] / found["passes_images"], "measured on a core"
    return 0.0025, "assumed, of a GPU"


def main() -> None:
    found = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    per_image, source = measured_seconds(found)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        type=int,
        default=32,
        help="a worker and step, B; the published recipe's on 8 workers",
    )
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
    parser.add_argument("--dim", type=int, default=128, help="of the keys")
    parser.add_argument("--parameters", type=int, default=PARAMETERS, help="that are trained")
    parser.add_argument(
        "--file-bytes", type=float, default=110e3, help="of an image's file; ImageNet's average"
    )
    parser.add_argument(
        "--seconds-per-image", type=float, default=per_image, help=f"of computing ({source})"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=1.25e9, help="bytes/s that a worker receives; 10 Gbit/s"
    )
    parser.add_argument("--latency", type=float, default=50e-6, help="seconds of a message")
    hops = measured_hop(found)
    given = {
        "hop": (hops["hop_s"], "seconds of a hop of Gloo (measured)"),
        "fixed": (hops["hop_fixed_s"], "seconds of a collective besides its hops (measured)"),
        "nccl-launch": (20e-6, "seconds of a kernel's start (assumed)"),
        "nccl-hop": (5e-6, "seconds of a hop between nodes (assumed: InfiniBand)"),
        "nccl-bandwidth": (20e9, "bytes/s (assumed: 200 Gbit/s)"),
        "gpu-seconds-per-image": (1 / 2100, "of computing (assumed: an A100 in bf16)"),
    }
    for name, (default, about) in given.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=about)
    options = parser.parse_args()
    if options.seconds_per_image != per_image:
        source = "given"
    computing = f"{options.seconds_per_image:.4f} s of computing each ({source})"
    print(f"{options.images} images of {options.size} pixels a worker and step, {computing};")
    print(
        f"{options.bandwidth / 1e9:g} GB/s received, {options.latency * 1e6:g} us a message; nothing overlaps\n"
    )
    table(options)
    print()
    norm_table(options)
    took, fixed = 1e6 * options.hop, 1e6 * options.fixed
    print(f"\nA hop of Gloo takes {took:.0f} us, and a collective {fixed:.0f} us besides.")
    wait_table(options)
    if "traffic_images" in found:
        print(f"\ncounted in real runs, as {LATEST.name} has it:")
        compare(found)


if __name__ == "__main__":
    main()
