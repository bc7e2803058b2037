"""MGD as a distiller: an adapter around mgd/. At a refresh all workers measure, rank 0 solves, and all get the matching."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from job.cluster import comm
from job.data.randomness import permutation
from job.declare import option
from job.distill.base import Change, Distiller, DistillOptions, Networks
from job.distill.teacher import Teacher
from job.engine.passes import BATCH, centre_crops, evaluating
from job.engine.run import Run
from job.errors import RunError
from job.metrics import tensorboard
from job.networks import DEPTH
from job.schedules import parse_refresh
from mgd.assignment import assign
from mgd.cost import channel_cost
from mgd.distiller import MGDistiller
from mgd.reducers import REDUCERS, Reduced

FIXED_POINT = 2.0**32  # costs are summed as whole multiples of 1 / FIXED_POINT


@dataclass(frozen=True)
class MGDOptions(DistillOptions):
    """Matching Guided Distillation."""

    group = "mgd"

    reducer: str = option("amp", "how the teacher channels of a match become one", choices=tuple(REDUCERS))
    margins: str = option("loaded", "init: margins of an unloaded teacher, as the original had", choices=("loaded", "init"))
    mgd_stages: list[int] = option([1, 2, 3, 4], "stages to distil", at_least=1, below=DEPTH + 1, many=True)
    stage_weights: list[float] = option([], "their weights, in order (default: 1 / 2^(4 - i))", at_least=0.0, many=True)
    matching: str = option("solved", "random: drawn from the seed and never solved, a control", choices=("solved", "random"))
    mgd_images: int = option(20_000, "images that a refresh measures", at_least=1)
    refresh_epochs: str = option("log", "when the matching is solved: log, never, every:N, or 0,5,10", parse=parse_refresh)


class MGD(Distiller):
    """Matching Guided Distillation (mgd/distiller.py)."""

    name = "mgd"
    shapes = ("mgd_stages", "matching")
    config: MGDOptions
    module: MGDistiller

    def __init__(self, config: MGDOptions, widths: Mapping[int, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        channels = {stage: (widths[stage], teacher.norms[stage].num_features) for stage in config.mgd_stages}
        weights = dict(zip(config.mgd_stages, config.stage_weights, strict=False))  # of as many weights, or none
        try:
            self.module = MGDistiller(channels, config.reducer, config.loss_factor, DEPTH, weights)
        except ValueError as error:
            raise RunError(
                f"--teacher {config.teacher} ({teacher.shown}) for -a {config.arch}, width {config.width}: {error}"
            ) from None
        if config.margins == "loaded":
            self.module.load_margins(teacher.norms)
        if config.matching == "random":
            draw_matchings(self.module, config.seed)

    @staticmethod
    def stages(config: MGDOptions) -> list[int]:
        """Return the stages that are distilled."""
        return config.mgd_stages

    @property
    def names(self) -> list[str]:
        """The names of the features."""
        return [f"layer{stage}" for stage in self.module.stages]

    def targets(self, teacher: Mapping[str, torch.Tensor], generator: torch.Generator) -> list[Reduced]:
        """Return the reduced features of each stage, S / T of the teacher's."""
        return self.module.targets([teacher[name] for name in self.names], generator)

    def loss(self, student: Mapping[str, torch.Tensor], targets: list[Reduced]) -> torch.Tensor:
        """Return the loss of the student's features {"layerN": (b, S, H, W)}, ()."""
        return self.module([student[name] for name in self.names], targets)

    def before_epoch(self, epoch: int, networks: Networks) -> Change:
        """Solve the matchings if this is an epoch of --refresh-epochs."""
        due = parse_refresh(self.config.refresh_epochs)(epoch)
        return prepare_refresh(self, epoch, networks) if due else Change()

    def check(self, saved: Mapping[str, torch.Tensor]) -> None:
        """RunError: the margins in a checkpoint are not the teacher's."""
        for stage in self.module.stages:
            old, new = saved[f"margin{stage}"], self.module.margin(stage).cpu()
            if old.shape != new.shape or not torch.allclose(old, new):
                raise RunError("the checkpoint's margins are not this teacher's: resume with the same --teacher and --margins")

    def histograms(self) -> dict[str, np.ndarray]:
        """Return the distributions of the margins and of each BN_i."""
        found = {f"margins/layer{stage}": self.module.margin(stage) for stage in self.module.stages}
        for stage in self.module.stages:
            state = self.module.get_submodule(f"bn{stage}").state_dict().items()
            found |= {f"bn{stage}/{name}": value for name, value in state if name != "num_batches_tracked"}
        return {name: value.cpu().numpy() for name, value in found.items()}


def draw_matchings(module: MGDistiller, seed: int) -> None:
    """Match each student channel to teacher channels at random, none twice: the first G x S of a permutation of all T."""
    for stage in module.stages:
        matching = module.matching(stage)  # (G, S)
        drawn = permutation(len(module.margin(stage)), seed, "matching", sample=stage)  # (T,)
        matching.copy_(torch.from_numpy(drawn[: matching.numel()]).view_as(matching))


def prepare_refresh(mgd: MGD, epoch: int, networks: Networks) -> Change:
    """Solve the matching of every stage on a fixed sample of the images; return the change.

    The matching is the same, to the last index, for any number of workers with equally many threads: batches have the same images
    whoever measures them, and their costs are added as 64-bit fixed-point numbers, whose sum does not depend
    on the order.

    A collective. Stopped, on all workers: a signal came.
    """
    run, config, module = networks.run, mgd.config, mgd.module
    begun = time.perf_counter()
    sample = permutation(len(networks.images), config.seed, "refresh")[: config.mgd_images].tolist()
    sums = measure(mgd, networks, sample)
    measured = time.perf_counter()
    costs = {
        stage: comm.total(cost, f"refresh.{stage}").double() / FIXED_POINT / len(sample)  # (S, T)
        for stage, cost in sums.items()
    }
    gathered = time.perf_counter()
    solved = solve(costs, {stage: module.matching(stage) for stage in costs}, run)
    took = {"measuring": measured - begun, "gathering": gathered - measured, "solving": time.perf_counter() - gathered}  # s

    def record() -> None:
        run.log.line(
            f"{mgd.name}: refresh before epoch {epoch} on {len(sample)} images: measuring {took['measuring']:.1f} s, "
            f"gathering {took['gathering']:.2f} s, solving {took['solving']:.2f} s"
        )
        for stage, matching in solved.items():
            report(mgd, run, epoch, stage, costs[stage].cpu(), matching, took)

    return Change({f"matching{stage}": matching for stage, matching in solved.items()}, record)


@torch.no_grad()
def measure(mgd: MGD, networks: Networks, sample: list[int]) -> dict[int, torch.Tensor]:
    """Return {stage: (S, T) int64}, this worker's part of the costs of `sample`, in fixed point.

    A collective. RunError, on all workers: features are not finite, or too many images cannot be decoded.
    """
    run, config, module = networks.run, mgd.config, mgd.module
    student, teacher = networks.framework.encoder, networks.teacher.net
    shapes = {stage: (module.matching(stage).shape[1], len(module.margin(stage))) for stage in module.stages}
    sums = {stage: torch.zeros(shape, dtype=torch.int64, device=run.device) for stage, shape in shapes.items()}
    finite = torch.ones((), dtype=torch.bool, device=run.device)
    with evaluating(student):
        for inputs, _ in centre_crops(networks.images, sample, BATCH, config, run, "measuring"):
            with run.autocast(config.precision):
                s, t = student(inputs), teacher(inputs)
            for stage in module.stages:
                cost = channel_cost(s[f"layer{stage}"], t[f"layer{stage}"])
                finite &= cost.isfinite().all()
                sums[stage] += (cost * FIXED_POINT).round().long()
    if run.total(broken=~finite)["broken"]:
        raise RunError("a network's features are not finite, so no matching can be solved: see whether the loss diverged", code=1)
    return sums


def solve(costs: dict[int, torch.Tensor], matchings: dict[int, torch.Tensor], run: Run) -> dict[int, torch.Tensor]:
    """Return the best matching (G, S) of every stage's costs (S, T), of the shape of today's `matchings`, on the CPU.

    Rank 0 solves; the others wait in one broadcast.
    """
    best = [torch.zeros(matching.shape, dtype=torch.int64) for matching in matchings.values()]
    if run.rank == 0:
        best = [assign(cost, matching.shape[0]) for cost, matching in zip(costs.values(), matchings.values(), strict=True)]
    sizes = [matching.numel() for matching in best]
    flat = comm.broadcast(torch.cat([matching.flatten() for matching in best]), "refresh.matching")
    return {stage: part.view_as(matching) for stage, part, matching in zip(costs, flat.split(sizes), best, strict=True)}


def report(mgd: MGD, run: Run, epoch: int, stage: int, cost: torch.Tensor, after: torch.Tensor, took: dict[str, float]) -> None:
    """Log a stage's new matching `after` (G, S) and what it changes.

    Logged: shape, mean cost of a pair before and after, fraction of the student's channels changed.
    cost: (S, T). took: seconds of the whole refresh, all stages together, by what they went into.
    Its record is one of the epoch's first step: a run that goes on from before that step refreshes again.
    """
    before, columns = mgd.module.matching(stage).cpu(), torch.arange(cost.shape[0])  # (G, S), (S,)
    old, new = (cost[columns, matching].mean().item() for matching in (before, after))
    changed = (before.sort(dim=0).values != after).any(dim=0).double().mean().item()
    G, S = after.shape
    shape = f"matching {G}x{S} of {cost.shape[1]}"
    run.log.line(f"  layer{stage}: {shape}, cost {old:.4f} -> {new:.4f}, {100 * changed:.1f} % of channels changed")
    shares = dict(groups=G, channels=S, cost_before=old, cost_after=new, changed=changed)
    run.log.record("refresh", epoch=epoch, step=0, distiller=mgd.name, stage=stage, **shares, **took)
    tensorboard.matching(run.log, mgd.name, epoch, stage, cost, before, after)
