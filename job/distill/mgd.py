"""MGD as a distiller: an adapter around mgd/.

At a refresh all workers measure the costs, and rank 0 solves and broadcasts the matching.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.data.randomness import permutation
from job.declare import option
from job.distill.base import Change, Distiller, Networks
from job.distill.maps import unequal_maps
from job.distill.options import DistillOptions
from job.distill.teacher import Teacher
from job.engine.passes import BATCH, centre_crops, evaluating
from job.engine.run import Run
from job.errors import RunError
from job.metrics import tensorboard
from job.networks import DEPTH, Outline
from job.schedules import parse_refresh
from mgd.assignment import assign
from mgd.cost import channel_cost
from mgd.distiller import MGDistiller
from mgd.pooled import PooledMatching, pooled_cost, pooled_sums
from mgd.reducers import REDUCERS, Reduced

CORRECTION = "learn a 1x1 convolution for each stage, so the student can deviate from the matching"
WEIGHT = "weight of the loss of matched pooled features, in addition to the stages' (0: off)"
POOLED, LAST = "pooled", f"layer{DEPTH}"
FIXED_POINT = 2.0**32  # costs are summed as integer multiples of 1 / FIXED_POINT

Matched = int | str  # a stage, or POOLED
# The reduced maps of each stage, and reduced pooled features (b, S).
Targets = tuple[list[Reduced], torch.Tensor | None]


@dataclass(frozen=True)
class MGDOptions(DistillOptions):
    """Matching Guided Distillation."""

    group = "mgd"

    reducer: str = option(
        "amp", "how matched teacher channels are reduced to one", choices=tuple(REDUCERS)
    )
    margins: str = option(
        "loaded",
        "init: margins before the teacher is loaded, as in the original code",
        choices=("loaded", "init"),
    )
    mgd_stages: list[int] = option(
        [1, 2, 3, 4], "stages to distil", at_least=1, below=DEPTH + 1, many=True
    )
    stage_weights: list[float] = option(
        [], "weights of --mgd-stages, in order (default: 1 / 2^(4 - i))", at_least=0.0, many=True
    )
    matching: str = option(
        "solved",
        "random: drawn from the seed and never solved, as a control",
        choices=("solved", "random"),
    )
    mgd_images: int = option(20_000, "images measured at a refresh", at_least=1)
    refresh_epochs: str = option(
        "log", "when the matching is solved: log, never, every:N, or 0,5,10", parse=parse_refresh
    )
    mgd_correction: bool = option(False, CORRECTION)
    mgd_pooled: float = option(0.0, WEIGHT, at_least=0.0)


class MGD(Distiller):
    """Matching Guided Distillation (mgd/distiller.py)."""

    name = "mgd"
    shapes = ("mgd_stages", "matching", "mgd_correction", "mgd_pooled")
    compares_pooled = False
    config: MGDOptions
    module: MGDistiller

    def __init__(self, config: MGDOptions, widths: Mapping[Any, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        channels = {stage: (widths[stage], teacher.widths[stage]) for stage in config.mgd_stages}
        # --stage-weights has a weight for each stage, or is empty.
        weights = dict(zip(config.mgd_stages, config.stage_weights, strict=False))
        try:
            self.module = MGDistiller(
                channels, config.reducer, config.loss_factor, DEPTH, weights, config.mgd_correction
            )
            if config.mgd_pooled:
                S, T = widths[DEPTH], teacher.widths[DEPTH]
                groups = 1 if config.reducer == "sm" else None
                self.module.add_module(POOLED, PooledMatching(S, T, groups))
        except ValueError as error:
            raise RunError(
                f"--teacher {config.teacher} ({teacher.shown}) for -a {config.arch}, "
                f"width {config.width}: {error}"
            ) from None
        if config.margins == "loaded":
            self.module.load_margins(teacher.norms)
        if config.matching == "random":
            draw_matchings(self, config.seed)

    @classmethod
    def misfit(cls, config: MGDOptions, student: Outline, teacher: Teacher) -> str:
        """Return which maps, or which batch norm for the margins, student or teacher lack."""
        if unequal := unequal_maps(cls.stages(config), config.arch, student, teacher):
            return unequal
        if without := [stage for stage in cls.stages(config) if stage not in teacher.norms]:
            stage = f"layer{without[0]} of the teacher ({teacher.shown})"
            return f"{stage} does not end in a batch norm; expected one, which gives the margins"
        if config.mgd_pooled and student.pooled != student.maps[DEPTH][0]:
            expected = f"expected the maps of layer{DEPTH}, or no --mgd-pooled"
            return f"{config.arch} pools other features; {expected}"
        return ""

    @staticmethod
    def stages(config: MGDOptions) -> list[int]:
        """Return the stages whose features are distilled, as maps or as pooled features."""
        return sorted({*config.mgd_stages, DEPTH}) if config.mgd_pooled else config.mgd_stages

    @property
    def pooled(self) -> PooledMatching | None:
        """The matching of pooled features, if there is one."""
        return getattr(self.module, POOLED, None)

    @property
    def matchings(self) -> dict[Matched, torch.Tensor]:
        """All matchings (G, S)."""
        matchings: dict[Matched, torch.Tensor] = {}
        for stage in self.module.stages:
            matchings[stage] = self.module.matching(stage)
        return matchings | ({POOLED: self.pooled.matching} if self.pooled else {})

    @property
    def channels(self) -> dict[Matched, tuple[int, int]]:
        """The channels (S, T) of all matchings."""
        channels: dict[Matched, tuple[int, int]] = {}
        for stage in self.module.stages:
            channels[stage] = self.module.matching(stage).shape[1], len(self.module.margin(stage))
        return channels | ({POOLED: self.pooled.channels} if self.pooled else {})

    @property
    def names(self) -> list[str]:
        """The names of the stages' features."""
        return [f"layer{stage}" for stage in self.module.stages]

    def targets(self, teacher: Mapping[str, torch.Tensor], generator: torch.Generator) -> Targets:
        """Return the reduced maps of each stage, S / T of the teacher's, and pooled features."""
        maps = self.module.targets([teacher[name] for name in self.names], generator)
        return maps, self.pooled.target(teacher[LAST]) if self.pooled else None

    def loss(self, student: Mapping[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """Return the loss of the student's features {"layerN": (b, S, H, W)}, ()."""
        maps, vectors = targets
        loss = self.module([student[name] for name in self.names], maps)
        if not self.pooled or vectors is None:
            return loss
        distance = self.pooled(student[LAST], vectors) * self.config.mgd_pooled
        return loss + distance / (len(vectors) * self.factor).to(distance.dtype)

    def before_epoch(self, epoch: int, networks: Networks) -> Change:
        """Solve the matchings if --refresh-epochs includes this epoch."""
        due = parse_refresh(self.config.refresh_epochs)(epoch)
        return prepare_refresh(self, epoch, networks) if due else Change()

    def check(self, saved: Mapping[str, torch.Tensor]) -> None:
        """RunError: the margins in a checkpoint differ from the teacher's."""
        for stage in self.module.stages:
            old, new = saved[f"margin{stage}"], self.module.margin(stage).cpu()
            if old.shape != new.shape or not torch.allclose(old, new):
                raise RunError(
                    f"--teacher {self.config.teacher}: its margins differ from the checkpoint's; "
                    "expected equal ones. Resume with the same --teacher and --margins"
                )

    def histograms(self) -> dict[str, np.ndarray]:
        """Return the distributions of margins, batch norms and corrections, by name."""
        tensors: dict[str, torch.Tensor] = {}
        norms: dict[str, nn.Module] = {}
        for stage in self.module.stages:
            tensors[f"margins/layer{stage}"] = self.module.margin(stage)
            norms[f"bn{stage}"] = self.module.get_submodule(f"bn{stage}")
            if self.module.correction:
                weight = self.module.get_parameter(f"correction{stage}.weight")
                tensors[f"correction{stage}"] = weight.detach()
        if self.pooled:
            norms[POOLED] = self.pooled.bn
        for name, norm in norms.items():
            state = norm.state_dict()
            del state["num_batches_tracked"]
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
        return {name: value.cpu().numpy() for name, value in tensors.items()}


def draw_matchings(mgd: MGD, seed: int) -> None:
    """Match student channels to random teacher channels, none of them twice.

    They are the first G x S of a permutation of all T.
    """
    for stage, matching in mgd.matchings.items():  # (G, S)
        sample = stage if isinstance(stage, int) else 0  # stages count from 1
        drawn = permutation(mgd.channels[stage][1], seed, "matching", sample=sample)  # (T,)
        matching.copy_(torch.from_numpy(drawn[: matching.numel()]).view_as(matching))


def prepare_refresh(mgd: MGD, epoch: int, networks: Networks) -> Change:
    """Solve every stage's matching on a fixed sample of the images, and return the change.

    The matching is the same, to the last index, for any number of workers with equally many
    threads. The batches have the same images on any worker. Their costs are added as 64-bit
    fixed-point numbers, so the sum does not depend on the order.

    A collective. Stopped, on all workers: a signal arrived.
    """
    run, config = networks.run, mgd.config
    start = time.perf_counter()
    sample = permutation(len(networks.images), config.seed, "refresh")[: config.mgd_images].tolist()
    sums = measure(mgd, networks, sample)
    measured = time.perf_counter()
    costs = {}
    for stage, cost in sums.items():
        name = f"refresh.{stage}"
        total = comm.to_host(comm.total(cost, name), name)  # (S, T)
        costs[stage] = total.double() / FIXED_POINT / len(sample)
    if mgd.pooled:
        costs[POOLED] = pooled_cost(costs[POOLED])
    gathered = time.perf_counter()
    solved = solve(costs, mgd.matchings, run)
    seconds = {
        "measuring": measured - start,
        "gathering": gathered - measured,
        "solving": time.perf_counter() - gathered,
    }

    def record() -> None:
        run.log.line(
            f"{mgd.name}: refresh before epoch {epoch} on {len(sample)} images: "
            f"measuring {seconds['measuring']:.1f} s, gathering {seconds['gathering']:.2f} s, "
            f"solving {seconds['solving']:.2f} s"
        )
        for stage, matching in solved.items():
            report(mgd, run, epoch, stage, costs[stage], matching, seconds)

    return Change({buffer(stage): matching for stage, matching in solved.items()}, record)


def buffer(stage: Matched) -> str:
    """Return a matching's name in the distiller's state."""
    return f"matching{stage}" if isinstance(stage, int) else f"{POOLED}.matching"


@torch.no_grad()
def measure(mgd: MGD, networks: Networks, sample: list[int]) -> dict[Matched, torch.Tensor]:
    """Return {stage: (S, T) int64}, the costs of this worker's images of `sample`, in fixed point.

    For pooled features, return the sums (S + 2, T + 2) from which the costs are computed. With
    --mgd-correction, the student's maps are the corrected ones, as in the loss.

    A collective. RunError, on all workers: a feature is not finite, or too many images cannot be
    decoded.
    """
    run, config, module = networks.run, mgd.config, mgd.module
    student, teacher = networks.framework.encoder, networks.teacher.net
    sums = {
        stage: torch.zeros(shape, dtype=torch.int64, device=run.device)
        for stage, shape in mgd.channels.items()  # (S, T)
    }
    if mgd.pooled:
        sums[POOLED] = F.pad(sums[POOLED], (0, 2, 0, 2))
    finite = torch.ones((), dtype=torch.bool, device=run.device)
    with evaluating(student):
        for inputs, _ in centre_crops(networks.images, sample, BATCH, config, run, "measuring"):
            with run.autocast(config.precision):
                s, t = student(inputs), teacher(inputs)
            for stage, total in sums.items():
                if isinstance(stage, int):
                    corrected = module.corrected(stage, s[f"layer{stage}"].float())
                    cost = channel_cost(corrected, t[f"layer{stage}"])
                else:
                    cost = pooled_sums(s[LAST], t[LAST])
                finite &= cost.isfinite().all()
                total += (cost * FIXED_POINT).round().long()
    if run.total(broken=~finite)["broken"]:
        raise RunError(
            "cannot solve the matching: features of the student or the teacher are not finite. "
            "Check whether the loss has diverged",
            code=1,
        )
    return sums


def solve(
    costs: Mapping[Matched, torch.Tensor], matchings: Mapping[Matched, torch.Tensor], run: Run
) -> dict[Matched, torch.Tensor]:
    """Return the best matching (G, S) for every stage's costs (S, T), on the CPU.

    matchings: the current ones, which have the shapes. Rank 0 solves, and the other workers wait
    in one broadcast.
    """
    best = [torch.zeros(matching.shape, dtype=torch.int64) for matching in matchings.values()]
    if run.rank == 0:
        best = [
            assign(cost, matching.shape[0])
            for cost, matching in zip(costs.values(), matchings.values(), strict=True)
        ]
    sizes = [matching.numel() for matching in best]
    flat = comm.broadcast(torch.cat([matching.flatten() for matching in best]), "refresh.matching")
    return {
        stage: indices.view_as(matching)
        for stage, indices, matching in zip(costs, flat.split(sizes), best, strict=True)
    }


def report(
    mgd: MGD,
    run: Run,
    epoch: int,
    stage: Matched,
    cost: torch.Tensor,
    after: torch.Tensor,
    seconds: dict[str, float],
) -> None:
    """Log and record a stage's new matching `after` (G, S).

    It logs the shape, a pair's mean cost before and after, and the fraction of the student's
    channels that changed. cost: (S, T). seconds: of the refresh, all stages together, by activity.
    The record has the epoch's first step, because a run resumed before that step refreshes again.
    A matching of pooled features has only a log line, because the records are of stages.
    """
    before, columns = mgd.matchings[stage].cpu(), torch.arange(cost.shape[0])  # (G, S), (S,)
    old, new = (cost[columns, matching].mean().item() for matching in (before, after))
    changed = (before.sort(dim=0).values != after).any(dim=0).double().mean().item()
    G, S = after.shape
    shape = f"matching {G}x{S} of {cost.shape[1]}"
    name = f"layer{stage}" if isinstance(stage, int) else stage
    run.log.line(
        f"  {name}: {shape}, cost {old:.4f} -> {new:.4f}, {100 * changed:.1f} % of channels changed"
    )
    if not isinstance(stage, int):
        return
    fields = dict(groups=G, channels=S, cost_before=old, cost_after=new, changed=changed)
    run.log.record(
        "refresh", epoch=epoch, step=0, distiller=mgd.name, stage=stage, **fields, **seconds
    )
    tensorboard.matching(run.log, mgd.name, epoch, stage, cost, before, after)
