"""How fast the job is: every figure beside what it is compared with, measured in turn in one run.

python tests/campaigns/bench/bench.py [--quick] [--only PART ...]: `make bench`, about 12 minutes on two cores.

Ratios are medians of the turns' own ratios, whose two sides were measured within the same minute. The CPU's figures are those
of two workers, one core and one thread each: ResNet-18 from ResNet-50 (random weights), MoCo v2's head, 65,536 negatives,
224 pixels, a total batch of 32, JPEGs of 500x375. Written to results/latest.json, and beside it under date and machine.
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
GPU_BATCH, GPU_STEPS = 128, 20  # images a GPU; steps a turn
QUICK_BATCH, QUICK_STEPS = 8, 2  # the same with --quick
# The bare passes beside `bf16_compiled` are those of networks that are not compiled.
GPU_WAYS = {
    "float32": (),
    "bf16": ("--precision", "bf16"),
    "float32_device_views": ("--augment-on", "device"),
    "bf16_device_views": ("--precision", "bf16", "--augment-on", "device"),
    "bf16_compiled": ("--precision", "bf16", "--augment-on", "device", "--compile"),
}


class Bench:
    """Where the parts find their images and leave their figures, and how often and how large they measure."""

    def __init__(self, folder: Path, quick: bool):
        self.folder, self.photos, self.jobs = folder, folder / "photos", 0
        self.size, self.turns = (64, 1) if quick else (224, 5)
        self.quick = quick
        self.repeats = 1 if quick else 5
        setting.write_photos(self.photos, setting.PHOTOS)
        setting.write_teacher(self.photos)

    def part(self, script: str, *arguments, workers: int = 0) -> dict:
        """Run a part to its end, under horovodrun if it has workers, and return its figures."""
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
        """Start a job that takes turns at its steps."""
        self.jobs += 1
        arguments = [kind, photos or self.photos, "--size", self.size, *arguments]
        return Job(
            workers, HERE / "step.py", self.folder / f"job{self.jobs}", arguments, **environment
        )


def mean(found: list[dict], name: str) -> float:
    """The workers' mean of a figure."""
    return statistics.mean(worker[name] for worker in found)


def series(turns: list[list[dict]], name: str) -> list[float]:
    """A figure turn by turn."""
    return [mean(turn, name) for turn in turns]


def views(bench: Bench) -> dict:
    """Decoding and augmentation on one core."""
    return bench.part("views.py", bench.photos, "--size", bench.size, "--repeats", bench.repeats)


def scanning(bench: Bench) -> dict:
    """Scans of many files, and the memory of their loader processes."""
    files = (2000, 4000) if bench.quick else (100_000, 1_281_167)
    options = ("--repeats", min(3, bench.repeats), "--files", *files)
    return bench.part("scanning.py", bench.photos, *options)


def features(bench: Bench) -> dict:
    """Extraction and validation beside their bare work."""
    return bench.part(
        "features.py", bench.photos, "--size", bench.size, "--repeats", min(3, bench.repeats)
    )


def traffic(bench: Bench) -> dict:
    """Bytes that a step brings to a worker, counted by the kernel for two workers and for four."""
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
    found = {N: scale.hop(N, figures[f"hop_collective_{N}_s"], fixed) for N in (2, 4)}
    return figures | {"hop_s": found[2], "hop_of_4_s": found[4], "hop_fixed_s": fixed}


def matching(bench: Bench) -> dict:
    """A refresh of the matching with two workers."""
    return bench.part(
        "matching.py",
        bench.photos,
        "--size",
        bench.size,
        "--repeats",
        min(3, bench.repeats),
        workers=2,
    )


def step(bench: Bench) -> dict:
    """A step beside its own passes and beside the baseline's, and where its time goes."""
    with bench.job(2, "ours", "--passes") as job, bench.job(2, "plain") as other:
        warm = job.turn(), other.turn()
        ours, plain = zip(*((job.turn(), other.turn()) for _ in range(bench.turns)), strict=True)
    took, baseline = series(ours, "step"), series(plain, "step")
    figures = {
        "step_over_passes": setting.ratio(took, series(ours, "bare")),
        "speed_over_baseline": setting.ratio(baseline, took),
        "memory_over_baseline": mean(warm[0], "memory") / mean(warm[1], "memory"),
        "step_s": statistics.median(took),
        "step_baseline_s": statistics.median(baseline),
        "memory_bytes": mean(warm[0], "memory"),
        "memory_baseline_bytes": mean(warm[1], "memory"),
        "memory_imports_bytes": mean(warm[0], "imports"),
    }
    for name in ("data_wait", *KINDS, "threads"):
        figures[f"share_{name}"] = setting.ratio(series(ours, name), took)
    told = [turn[0] for turn in ours]  # of rank 0, which alone tells
    figures["share_logging"] = setting.ratio(
        [turn["telling"] for turn in told], [turn["step"] for turn in told]
    )
    figures["logging_s"] = statistics.median(turn["telling"] for turn in told)
    figures["drawing_s"] = statistics.median(turn["drawing"] for turn in told)
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
    """The step of each framework and distiller over that of MoCo v2 without a teacher."""
    options = ("--size", bench.size, "--repeats", bench.repeats)
    return bench.part("methods.py", bench.photos, *options)


def scaling(bench: Bench) -> dict:
    """A worker's step alone, beside another job's worker, and as one of two that share their batches.

    `weak_scaling` is the plain definition: the step of one worker, while the other core does nothing, over that of two with
    twice the images. Cores share caches and memory, so that a part of what is lost would be lost to any second process;
    `weak_scaling_beside_another` compares with two jobs of one worker each that run at once: what is lost to Horovod alone.
    """
    single = ("ours", "--batch", setting.BATCH // 2)
    with (
        bench.job(2, "ours") as both,
        bench.job(1, *single) as alone,
        bench.job(1, *single, "--core", 1) as another,
    ):
        for job in (both, alone, another):
            job.turn()
        two, one, beside = [], [], []
        for _ in range(bench.turns):
            two.append(both.turn())
            one.append(alone.turn())
            for job in (alone, another):
                job.start()
            beside.append(alone.finish() + another.finish())
    return {
        "weak_scaling": setting.ratio(series(one, "step"), series(two, "step")),
        "weak_scaling_beside_another": setting.ratio(series(beside, "step"), series(two, "step")),
        "step_one_worker_s": statistics.median(series(one, "step")),
        "step_two_workers_s": statistics.median(series(two, "step")),
    }


def gpu(bench: Bench) -> dict:
    """On GPUs, one worker each, with loader processes: steps in float32 and bf16, and more.

    Each way's figures are printed when they are found. Without a GPU, --quick tries the part on the
    CPU with tiny batches, and compiles nothing.
    """
    there = torch.cuda.is_available()
    workers, figures = max(1, torch.cuda.device_count()), {}
    batch, steps = (QUICK_BATCH, QUICK_STEPS) if bench.quick else (GPU_BATCH, GPU_STEPS)
    every = ",".join(map(str, range(workers))) if there else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every)
    many = bench.folder / "many"
    setting.write_photos(many, 4 * batch * workers)
    setting.write_teacher(many)
    options = ("--batch", batch * workers, "--steps", steps, "--passes", "--loaders", -1)
    ways = {name: more for name, more in GPU_WAYS.items() if there or "--compile" not in more}
    for name, more in ways.items():
        with bench.job(
            workers, "ours", *options, *more, photos=many, CUDA_VISIBLE_DEVICES=visible
        ) as job:
            job.turn()
            turns = [job.turn() for _ in range(bench.turns)]
        took = series(turns, "step")
        found = {
            f"gpu_{name}_images_per_s": batch * workers / statistics.median(took),
            f"gpu_{name}_seconds_per_image": statistics.median(series(turns, "bare")) / batch,
            f"gpu_{name}_step_over_passes": setting.ratio(took, series(turns, "bare")),
            f"gpu_{name}_share_data_wait": setting.ratio(series(turns, "data_wait"), took),
            f"gpu_{name}_memory_bytes": max(mean(turn, "memory") for turn in turns),
        }
        print(f"  {json.dumps(found)}", file=sys.stderr, flush=True)
        figures |= found
    return figures


ALL = (views, scanning, features, traffic, hops, matching, step, sync_norm, methods, scaling, gpu)
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
        help="see that all works: small images, no bars, no results kept",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="these parts alone; no results kept",
    )
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # through the ends of its jobs, which stand still else for ever
    figures = report.circumstances(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.quick)
        for name in options.only:
            alone = options.only == ["gpu"]
            if name == "gpu" and not (alone and options.quick) and (reason := no_gpu()):
                if alone:
                    sys.exit(f"error: --only gpu: {reason}")
                continue
            begun = time.perf_counter()
            print(f"{name}: {PARTS[name].__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
            figures |= PARTS[name](bench)
            print(f"  {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    whole = set(options.only) == set(PARTS)
    missed = report.table(figures, whole)
    if options.quick:
        return print("--quick: figures of no meaning, bars not held")
    if whole:
        report.keep(figures)
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
