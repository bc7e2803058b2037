"""Steps of training at 224 pixels, in turns: the project's own (beside the bare passes of its networks), or the baseline's.

horovodrun -np N python tests/campaigns/bench/step.py FOLDER {ours,plain} PHOTOS: bench.py starts it. One turn is some steps; the
turn's figures are their medians. "ours" is the program itself: what `job.build.build` makes, trained by
`job.train.train_epoch`, a step a call.
"""

import dataclasses
import functools
import resource
import statistics
import time
from pathlib import Path

import torch

import baseline
import setting
from breakdown import Breakdown
from job.cluster import comm, task
from job.journal import TrainingJournal
from job.engine.run import Run
from job.position import START
from job.train import train_epoch
from job.build import build
from job.data.augment import normalize
from job.networks import build_resnet, with_features
from telling import Telling, journal
from turns import take_turns


WARM = 4  # steps: after so many a worker's memory hardly grows any more


class Ours:
    """The project's step, and the passes of its networks by themselves."""

    def __init__(self, options, run: Run):
        self.run, self.options = run, options
        config = setting.config(
            options.photos, options.batch, options.size, out=str(options.folder / "run")
        )
        loaders = task.cores() if options.loaders < 0 else options.loaders
        given = {name: getattr(options, name) for name in ("precision", "augment_on", "compile")}
        self.config = dataclasses.replace(config, workers=loaders, **given)
        self.training = build(self.config, run)
        run.begin(dataclasses.asdict(self.config), None, len(self.training.images), "")
        self.batches = self.training.batches(START)
        self.journal = journal(self.training, Journal)
        self.journal.breakdown = Breakdown(self.training)
        self.done = 0  # steps
        self.passes = functools.cache(
            lambda: Passes(self)
        )  # built after the first steps have shown their peak of memory
        self.telling = functools.cache(
            lambda: Telling(self.training, str(options.folder))
        )  # rank 0's

    def turn(self) -> dict:
        """Some steps, then, but in the first turn, the passes alone as often, and on rank 0 what telling of them takes."""
        first = self.done == 0
        found = [self.step() for _ in range(WARM if first else self.options.steps)]
        figures = medians(found) | memory(self.run.device)
        if self.options.passes and not first:
            figures |= medians([self.passes()() for _ in found])
            if self.run.rank == 0:
                figures |= medians([self.telling()() for _ in found])
        return figures

    def step(self) -> dict:
        """Do a step; return its seconds, and what they went into."""
        epoch, step = divmod(self.done, self.training.steps)
        self.done += 1
        self.journal.start_epoch(epoch, self.config.lr)
        train_epoch(self.training, self.batches, self.journal, epoch, range(step, step + 1))
        return self.journal.seconds


class Journal(TrainingJournal):
    """The program's own, whose clock is the bench's as well."""

    def start_epoch(self, epoch: int, rate: float) -> None:
        self.breakdown.clear()
        super().start_epoch(epoch, rate)

    def step(self, step: int, sums: dict[str, float]) -> None:
        spent = self.breakdown.seconds()
        super().step(step, sums)
        took = self.total / self.records[-1]["images_per_s"]
        self.seconds = {"step": took, "data_wait": took * self.records[-1]["data_wait"], **spent}


class Passes:
    """What no step can do without: the student forward and backward, key encoder and teacher forward; no loss, no network."""

    def __init__(self, ours: Ours):
        config, run = ours.config, ours.run
        B, device = run.own_batch(config.batch_size), run.device
        self.autocast = functools.partial(run.autocast, config.precision)
        on_gpu = device.type == "cuda"  # which has the fastest kernels for channels last
        layout = torch.channels_last if on_gpu else torch.preserve_format
        place = {"device": device, "memory_format": layout}
        net, key = (build_resnet(config.arch, config.moco_dim, config.mlp) for _ in range(2))
        self.student, self.key = with_features(net, config.mgd_stages).to(**place), key.to(**place)
        self.teacher = ours.training.distillation.networks.teacher.net
        self.images = normalize(
            torch.randint(
                256, (B, 3, config.image_size, config.image_size), dtype=torch.uint8, device=device
            )
        )
        self.gradient = torch.ones(B, config.moco_dim, device=device)

    def __call__(self) -> dict[str, float]:
        """Return the seconds of each."""
        found = {
            "student": setting.seconds(self.train),
            "key": setting.seconds(lambda: self.see(self.key)),
        }
        found["teacher"] = setting.seconds(lambda: self.see(self.teacher))
        return found | {"bare": sum(found.values())}

    def train(self) -> None:
        self.student.zero_grad()
        with self.autocast():
            encoded = self.student(self.images)
        encoded["fc"].backward(self.gradient.to(encoded["fc"].dtype))

    def see(self, net) -> None:
        with torch.no_grad(), self.autocast():
            net(self.images)


class Plain:
    """The baseline's step, on the CPU."""

    def __init__(self, options):
        comm.start()
        self.steps, self.first = options.steps, True
        self.baseline = baseline.Baseline(torch.load(options.photos / "teacher.pth"))
        self.batches = baseline.batches(setting.photos(options.photos), options.batch, options.size)

    def turn(self) -> dict:
        found = []
        for _ in range(WARM if self.first else self.steps):
            begun = time.perf_counter()
            self.baseline.step(*next(self.batches))
            found.append(time.perf_counter() - begun)
        self.first = False
        return {"step": statistics.median(found)} | memory(torch.device("cpu"))


def medians(found: list[dict]) -> dict:
    """The median of each figure."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def memory(device: torch.device) -> dict[str, int]:
    """The most that this worker has held so far, in bytes: without loader processes, of which it has none."""
    if device.type == "cuda":
        return {"memory": torch.cuda.max_memory_allocated()}
    return {"memory": peak(), "imports": IMPORTS}


def peak() -> int:
    """The most that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


IMPORTS = peak()  # torch, its CUDA libraries and Horovod: the same for any job


def main() -> None:
    parser = setting.parser(__doc__)
    parser.add_argument("kind", choices=("ours", "plain"))
    parser.add_argument("photos", type=Path)
    parser.add_argument(
        "--batch", type=int, default=setting.BATCH, help="images of a step, over all workers"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a turn: the first begins with cold caches"
    )
    parser.add_argument("--passes", action="store_true", help="measure the bare passes too")
    parser.add_argument("--core", type=int, default=0, help="of the first worker")
    parser.add_argument("--precision", default="float32")
    parser.add_argument(
        "--loaders",
        type=int,
        default=0,
        help="loader processes (-1: as many as a worker has cores)",
    )
    parser.add_argument("--augment-on", default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        setting.pin(options.core)
    if options.kind == "plain":
        return take_turns(options.folder, Plain(options).turn)
    with Run(str(options.folder / "run"), 1) as run:
        take_turns(options.folder, Ours(options, run).turn)


if __name__ == "__main__":
    main()
