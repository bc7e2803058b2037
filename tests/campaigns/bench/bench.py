"""Measure the speed and memory of the job. `make bench` needs about 20 minutes on two cores.

    python tests/campaigns/bench/bench.py [--quick] [--only PART ...]

Both sides of a ratio are measured in turn within a minute. The ratio is the median over the turns.
The CPU's figures are of two workers with one core and one thread each: ResNet-18 from ResNet-50
(random weights), MoCo v2's head, 65,536 negatives, 224 pixels, a total batch of 32, JPEGs of
500x375. They go to results/latest.json and to a copy named by date and machine.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import horovod.torch as hvd
import torch

import report
import scale
import setting
from breakdown import KINDS
from turns import Job, launch

HERE = Path(__file__).parent
GPU_BATCH, GPU_STEPS = 128, 20  # images per GPU, steps per turn
QUICK_BATCH, QUICK_STEPS = 8, 2  # the same with --quick
# With --quick, only methods that together have all networks, and one and two views.
QUICK_METHODS = ("disco", "simreg_without_contrast", "simsiam_mgd")
# The bare passes of `bf16_compiled` use uncompiled networks.
GPU_MODES = {
    "float32": (),
    "bf16": ("--precision", "bf16"),
    "float32_device_views": ("--augment-on", "device"),
    "bf16_device_views": ("--precision", "bf16", "--augment-on", "device"),
    "bf16_compiled": ("--precision", "bf16", "--augment-on", "device", "--compile"),
}


class Bench:
    """The folder of the bench's images and figures, the image size and the number of repeats."""

    def __init__(self, folder: Path, quick: bool):
        self.folder, self.photos, self.jobs = folder, folder / "photos", 0
        self.size, self.turns = (64, 1) if quick else (224, 5)
        self.quick = quick
        self.repeats = 1 if quick else 5
        setting.write_photos(self.photos, setting.PHOTOS)
        setting.write_teacher(self.photos)

    def part(self, script: str, *arguments, workers: int = 0) -> dict:
        """Run a part, under horovodrun if it has workers. Return its figures."""
        with open(self.folder / "output.txt", "w+") as output:
            command = [self.folder, *arguments]
            process = launch(workers, HERE / script, command, output)
            if process.wait():
                output.seek(0)
                raise RuntimeError(
                    f"{script} ended with code {process.returncode}:\n{output.read()}"
                )
        return json.loads((self.folder / f"{Path(script).stem}.json").read_text())

    def job(
        self, workers: int, kind: str, *arguments, photos: Path | None = None, **environment
    ) -> Job:
        """Start a job that does its steps in turns."""
        self.jobs += 1
        arguments = [kind, photos or self.photos, "--size", self.size, *arguments]
        return Job(
            workers, HERE / "step.py", self.folder / f"job{self.jobs}", arguments, **environment
        )


def mean(workers: list[dict], name: str) -> float:
    """Return the mean of a figure over the workers."""
    return statistics.mean(worker[name] for worker in workers)


def series(turns: list[list[dict]], name: str) -> list[float]:
    """Return a figure's mean over the workers for each turn."""
    return [mean(turn, name) for turn in turns]


def views(bench: Bench) -> dict:
    """Decoding and augmentation on one core."""
    return bench.part("views.py", bench.photos, "--size", bench.size, "--repeats", bench.repeats)


def images(bench: Bench) -> dict:
    """The steps from a file to a batch, decoders of JPEGs, and loader processes' memory."""
    processes = (1, 2) if bench.quick else (1, 16)
    options = ("--size", bench.size, "--repeats", bench.repeats, "--processes", *processes)
    return bench.part("images.py", bench.photos, *options)


def scanning(bench: Bench) -> dict:
    """Scans of many files, and the memory of their loader processes."""
    files = (2000, 4000) if bench.quick else (100_000, 1_281_167)
    options = ("--repeats", min(3, bench.repeats), "--files", *files)
    return bench.part("scanning.py", bench.photos, *options)


def imagenet(bench: Bench) -> dict:
    """All work on ImageNet's 1,281,167 images that decodes none of them."""
    sizes = (2000, 2, 20) if bench.quick else (1_281_167, 16, 640)
    names = ("--files", "--loaders", "--queries")
    options = [each for pair in zip(names, sizes, strict=True) for each in pair]
    return bench.part("imagenet.py", bench.photos, *options)


def features(bench: Bench) -> dict:
    """Extraction of features and validation, over their bare work."""
    return bench.part(
        "features.py", bench.photos, "--size", bench.size, "--repeats", min(3, bench.repeats)
    )


def traffic(bench: Bench) -> dict:
    """Bytes that a worker receives in a step, counted by the kernel, with two and four workers."""
    figures = {}
    for N in (2, 4):
        figures |= bench.part("traffic.py", "--size", bench.size, workers=N)
    batch = figures["traffic_images"] * 3 * bench.size**2  # bytes of a worker's images
    bound = [figures[f"shuffle_bytes_{N}"] / batch for N in (2, 4)]
    over_float = [
        figures[f"shuffle_bytes_{N}"] / figures[f"shuffle_float_bytes_{N}"] for N in (2, 4)
    ]
    return figures | {
        "shuffle_bytes_constant": max(bound) <= 1.01,
        "shuffle_bytes_over_batch": max(bound),
        "shuffle_bytes_over_float": max(over_float),
        "shuffle_bytes_over_baseline_4": figures["shuffle_bytes_4"]
        / figures["shuffle_baseline_bytes_4"],
    }


def hops(bench: Bench) -> dict:
    """Seconds of a small collective by Gloo with one worker, two and four, and of a hop."""
    options, figures = ("--repeats", 50 if bench.quick else 500), {}
    for N in (1, 2, 4):
        figures |= bench.part("hops.py", *options, workers=N)
    fixed = figures["hop_collective_1_s"]
    hop = {N: scale.hop(N, figures[f"hop_collective_{N}_s"], fixed) for N in (2, 4)}
    return figures | {"hop_s": hop[2], "hop_of_4_s": hop[4], "hop_fixed_s": fixed}


def matching(bench: Bench) -> dict:
    """A refresh of the matching with two workers."""
    options = ("--size", bench.size, "--repeats", min(3, bench.repeats))
    return bench.part("matching.py", bench.photos, *options, workers=2)


def step(bench: Bench) -> dict:
    """A step over its own passes and over the baseline's step, and where its time goes."""
    with bench.job(2, "ours", "--passes") as job, bench.job(2, "plain") as other:
        warm = job.turn(), other.turn()
        ours, plain = zip(*((job.turn(), other.turn()) for _ in range(bench.turns)), strict=True)
    step_times, baseline = series(ours, "step"), series(plain, "step")
    figures = {
        "step_over_passes": setting.ratio(step_times, series(ours, "bare")),
        "speed_over_baseline": setting.ratio(baseline, step_times),
        "memory_over_baseline": mean(warm[0], "memory") / mean(warm[1], "memory"),
        "step_s": statistics.median(step_times),
        "step_baseline_s": statistics.median(baseline),
        "memory_bytes": mean(warm[0], "memory"),
        "memory_baseline_bytes": mean(warm[1], "memory"),
        "memory_imports_bytes": mean(warm[0], "imports"),
    }
    for name in ("data_wait", *KINDS, "threads"):
        figures[f"share_{name}"] = setting.ratio(series(ours, name), step_times)
    rank_0 = [turn[0] for turn in ours]  # only this worker logs
    figures["share_logging"] = setting.ratio(
        [turn["logging"] for turn in rank_0], [turn["step"] for turn in rank_0]
    )
    figures["logging_s"] = statistics.median(turn["logging"] for turn in rank_0)
    figures["drawing_s"] = statistics.median(turn["drawing"] for turn in rank_0)
    for name in ("bare", "student", "key", "teacher"):
        figures[f"passes_{name}_s"] = statistics.median(series(ours, name))
    figures["passes_images"] = setting.BATCH // 2
    return figures


def sync_norm(bench: Bench) -> dict:
    """SimSiam's steps with and without synchronised batch norms, two workers."""
    repeats = 2 * bench.repeats
    options = ("--size", bench.size, "--repeats", repeats)
    return bench.part("sync_norm.py", bench.photos, *options, workers=2)


def methods(bench: Bench) -> dict:
    """The step of each framework and distiller over its own passes, and over MoCo v2's step."""
    options = ("--size", bench.size, "--repeats", min(3, bench.repeats))
    options += ("--methods", *QUICK_METHODS) if bench.quick else ()
    return bench.part("methods.py", bench.photos, *options)


def cached(bench: Bench) -> dict:
    """The teacher's pooled features read from a file, over those computed in each step."""
    options = ("--size", bench.size, "--repeats", min(3, bench.repeats))
    options += ("--rows", 1000) if bench.quick else ()
    return bench.part("cached.py", bench.photos, *options)


def scaling(bench: Bench) -> dict:
    """The step of one worker, of two workers of one job, and of two jobs with one worker each.

    `weak_scaling` is the step of one worker, with the other core idle, over the step of two workers
    with twice the images. The cores have caches and memory in common, so any second process costs
    time. `weak_scaling_beside_another` compares with two jobs of one worker each that run at once,
    so it shows the cost of Horovod only.
    """
    single = ("ours", "--batch", setting.BATCH // 2)
    with (
        bench.job(2, "ours") as both,
        bench.job(1, *single) as first,
        bench.job(1, *single, "--core", 1) as second,
    ):
        for job in (both, first, second):
            job.turn()
        two, one, beside = [], [], []
        for _ in range(bench.turns):
            two.append(both.turn())
            one.append(first.turn())
            for job in (first, second):
                job.start()
            beside.append(first.finish() + second.finish())
    return {
        "weak_scaling": setting.ratio(series(one, "step"), series(two, "step")),
        "weak_scaling_beside_another": setting.ratio(series(beside, "step"), series(two, "step")),
        "step_one_worker_s": statistics.median(series(one, "step")),
        "step_two_workers_s": statistics.median(series(two, "step")),
    }


def gpu(bench: Bench) -> dict:
    """Steps on GPUs in each of GPU_MODES: one worker per GPU, with loader processes.

    The figures of each mode are printed when they are complete. Without a GPU, --quick tries the
    part on the CPU with tiny batches and without --compile.
    """
    has_gpu = torch.cuda.is_available()
    workers, figures = max(1, torch.cuda.device_count()), {}
    batch, steps = (QUICK_BATCH, QUICK_STEPS) if bench.quick else (GPU_BATCH, GPU_STEPS)
    every = ",".join(map(str, range(workers))) if has_gpu else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every)
    many = bench.folder / "many"
    setting.write_photos(many, 4 * batch * workers)
    setting.write_teacher(many)
    options = ("--batch", batch * workers, "--steps", steps, "--passes", "--loaders", -1)
    modes = {name: more for name, more in GPU_MODES.items() if has_gpu or "--compile" not in more}
    for name, more in modes.items():
        with bench.job(
            workers, "ours", *options, *more, photos=many, CUDA_VISIBLE_DEVICES=visible
        ) as job:
            job.turn()
            turns = [job.turn() for _ in range(bench.turns)]
        step_times = series(turns, "step")
        measured = {
            f"gpu_{name}_images_per_s": batch * workers / statistics.median(step_times),
            f"gpu_{name}_seconds_per_image": statistics.median(series(turns, "bare")) / batch,
            f"gpu_{name}_step_over_passes": setting.ratio(step_times, series(turns, "bare")),
            f"gpu_{name}_share_data_wait": setting.ratio(series(turns, "data_wait"), step_times),
            f"gpu_{name}_memory_bytes": max(mean(turn, "memory") for turn in turns),
        }
        print(f"  {json.dumps(measured)}", file=sys.stderr, flush=True)
        figures |= measured
    return figures


ALL = (
    views,
    images,
    scanning,
    imagenet,
    features,
    traffic,
    hops,
    matching,
    step,
    sync_norm,
    methods,
    cached,
    scaling,
    gpu,
)
PARTS = {part.__name__: part for part in ALL}


def no_gpu() -> str:
    """Return why steps on GPUs cannot be measured; "" if they can."""
    if not torch.cuda.is_available():
        return "no GPU here; expected one. Use --quick to try the part on the CPU"
    if torch.cuda.device_count() > 1 and not hvd.nccl_built():
        return "Horovod has no NCCL; expected it for several GPUs. Build Horovod again"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="check that all parts work: small images, no bars, results not saved",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="only these parts; results not saved",
    )
    options = parser.parse_args()
    # SystemExit closes the jobs. Otherwise their stopped workers would stay for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = report.circumstances(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.quick)
        for name in options.only:
            only_gpu = options.only == ["gpu"]
            if name == "gpu" and not (only_gpu and options.quick) and (reason := no_gpu()):
                if only_gpu:
                    sys.exit(f"error: --only gpu: {reason}")
                continue
            start = time.perf_counter()
            print(f"{name}: {PARTS[name].__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
            figures |= PARTS[name](bench)
            print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    complete = set(options.only) == set(PARTS)
    missed = report.table(figures, complete)
    if options.quick:
        return print("--quick: the figures mean nothing, and no bar is checked")
    if complete:
        report.keep(figures)
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
