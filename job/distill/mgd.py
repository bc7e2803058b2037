"""A refresh: all workers measure, the sums meet, rank 0 solves, and all get the matching."""

import time

import torch

from job.cluster import comm
from job.data.randomness import permutation
from job.engine.passes import centre_crops, evaluating
from job.engine.run import Run
from job.engine.state import Training
from job.errors import RunError
from job.metrics import tensorboard
from mgd.assignment import assign
from mgd.cost import channel_cost

BATCH = 32  # images measured at a time, for any number of workers
FIXED_POINT = 2.0**32  # costs are summed as whole multiples of 1 / FIXED_POINT


def refresh(training: Training, epoch: int) -> None:
    """Solve the matching of every stage anew on a fixed sample of the images, and log what changed. A collective.

    The matching is the same, to the last index, for any number of workers with equally many threads: batches have the same images
    whoever measures them, and their costs are added as 64-bit fixed-point numbers, whose sum does not depend
    on the order. Stopped, on all workers: a signal came; nothing is changed or recorded.
    """
    run, config, distiller = training.run, training.config, training.distiller
    assert distiller
    begun = time.perf_counter()
    sample = permutation(len(training.images), config.seed, "refresh")[: config.mgd_images].tolist()
    sums = measure(training, sample)
    measured = time.perf_counter()
    costs = {
        stage: comm.total(cost, f"refresh.{stage}").double() / FIXED_POINT / len(sample)  # (S, T)
        for stage, cost in sums.items()
    }
    gathered = time.perf_counter()
    solved = solve(costs, {stage: distiller.matching(stage) for stage in costs}, run)

    took = {"measuring": measured - begun, "gathering": gathered - measured, "solving": time.perf_counter() - gathered}  # s
    run.log.line(
        f"refresh before epoch {epoch} on {len(sample)} images: measuring {took['measuring']:.1f} s, "
        f"gathering {took['gathering']:.2f} s, solving {took['solving']:.2f} s"
    )
    for stage, matching in solved.items():
        report(run, epoch, stage, costs[stage].cpu(), distiller.matching(stage).cpu(), matching, took)
        distiller.matching(stage).copy_(matching)


@torch.no_grad()
def measure(training: Training, sample: list[int]) -> dict[int, torch.Tensor]:
    """Return {stage: (S, T) int64}, this worker's share of the costs of `sample`, in fixed point.

    A collective. RunError, on all workers: features are not finite, or too many images cannot be decoded.
    """
    run, config, distiller = training.run, training.config, training.distiller
    student, teacher = training.moco.encoder_q, training.teacher
    assert distiller and teacher
    shapes = {stage: (distiller.matching(stage).shape[1], len(distiller.margin(stage))) for stage in distiller.stages}
    sums = {stage: torch.zeros(shape, dtype=torch.int64, device=run.device) for stage, shape in shapes.items()}
    finite = torch.ones((), dtype=torch.bool, device=run.device)
    with evaluating(student):
        for inputs, _ in centre_crops(training.images, sample, BATCH, config, run, "measuring"):
            with run.autocast(config.precision):
                s, t = student(inputs), teacher(inputs)
            for stage in distiller.stages:
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


def report(
    run: Run, epoch: int, stage: int, cost: torch.Tensor, before: torch.Tensor, after: torch.Tensor, took: dict[str, float]
) -> None:
    """Log a stage's matrix: shape, mean cost of a matched pair before and after, share of student channels matched anew.

    took: seconds of the whole refresh, all stages together, by what they went into.
    Its record is one of the epoch's first step: a run that goes on from before that step refreshes again.
    """
    columns = torch.arange(cost.shape[0])
    old, new = (cost[columns, matching].mean().item() for matching in (before, after))
    changed = (before.sort(dim=0).values != after).any(dim=0).double().mean().item()
    G, S = after.shape
    shape = f"matching {G}x{S} of {cost.shape[1]}"
    run.log.line(f"  layer{stage}: {shape}, cost {old:.4f} -> {new:.4f}, {100 * changed:.1f} % of channels changed")
    shares = dict(groups=G, channels=S, cost_before=old, cost_after=new, changed=changed)
    run.log.record(epoch=epoch, step=0, stage=stage, **shares, **took)
    tensorboard.matching(run, epoch, stage, cost, before, after)
