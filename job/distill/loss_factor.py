"""The loss factor of --loss-share, which all workers measure at the start."""

import math
import time

import torch

from job.cluster import comm
from job.data import randomness
from job.data.folders import every_nth_batch
from job.data.views import NumberedCrops
from job.distill.base import Change, Distiller, Networks
from job.distill.momentum import MOMENTUM
from job.distill.pooled import pooled
from job.engine.passes import BATCH, centre_crops, evaluating
from job.engine.statistics import with_batch_statistics
from job.errors import RunError

BATCHES = 8  # of BATCH images, or fewer in a small set


def measure_factor(distiller: Distiller, networks: Networks, share: float) -> Change:
    """Return the change to the factor that makes the loss `share` times the reference loss.

    Both are losses at the start: the reference loss is computed, and the distillation loss is
    measured. So a share means the same for any image size, batch and teacher. The factor is the
    same, bit for bit, for any number of workers with equally many threads.

    A collective. RunError, on all workers: no factor results in that share.
    Stopped, on all workers: a signal arrived.
    """
    run, framework, config = networks.run, networks.framework, distiller.config
    start = time.perf_counter()
    order = randomness.permutation(len(networks.images), config.seed, "refresh").tolist()
    # Complete batches only, because a batch of one image has no batch statistics.
    complete = len(order) // BATCH * BATCH or len(order)
    sample = order[: min(complete, BATCHES * BATCH)]
    losses = measure(distiller, networks, sample)  # (n,)
    raw = comm.to_host(comm.total(losses, "scale"), "scale").mean().item()
    expected = share * framework.reference
    factor = raw / expected if expected else math.inf
    if not 0 < factor < math.inf:
        raise RunError(
            f"cannot measure the factor of --loss-share {config.loss_share:g}: the initial "
            f"distillation loss over {len(sample)} images is {raw:g}; expected a finite value "
            "above 0. Check the teacher file, or set --loss-factor",
            code=1,
        )
    seconds = time.perf_counter() - start

    def record() -> None:
        run.log.line(
            f"{distiller.name}: loss factor {factor:.6g}: the distillation loss of {len(sample)} "
            f"images is {raw:.6g} an image; target: {share:g} of {framework.reference_text}, "
            f"{expected:.4g}; measuring {seconds:.1f} s"
        )
        numbers = {"loss_factor": factor, "raw_distillation": raw, "measuring": seconds}
        run.log.record("factor", epoch=0, step=0, distiller=distiller.name, **numbers)

    return Change({"factor": torch.tensor(factor, dtype=torch.float64)}, record)


@torch.no_grad()
def measure(distiller: Distiller, networks: Networks, sample: list[int]) -> torch.Tensor:
    """Return each batch's distillation loss at a factor of 1, (n,) float64, for n batches.

    sample: indices of the images of all workers. A loss is a mean over the images. The batches of
    other workers have 0, so the sum over the workers is exact in any order. The student is in eval
    mode. The distiller is a copy in train mode, so the run's distiller does not change.

    A collective. RunError, on all workers: too many images cannot be decoded.
    """
    run, config, teacher = networks.run, distiller.config, networks.teacher
    student = networks.framework.encoder
    if distiller.batch_statistics:
        student = with_batch_statistics(student)
    probe = distiller.with_change(Change({"factor": torch.ones(())}))
    probe.module.train()
    n = len(every_nth_batch(sample, BATCH, 0, 1))
    losses = torch.zeros(n, dtype=torch.float64, device=run.device)
    generator = torch.Generator(run.device)
    with evaluating(student):
        images = networks.images
        crops = centre_crops(images, sample, BATCH, config, run, "loss factor", NumberedCrops)
        for number, (inputs, indices) in enumerate(crops):
            index = run.rank + number * run.size
            generator.manual_seed(
                randomness.torch_seed(config.seed, "drop", epoch=0, step=index, sample=0)
            )
            with run.autocast(config.precision):
                s, t = student(inputs), teacher.features(inputs, indices.cpu())
                if probe.momentum(config) is not None:
                    t = t | {MOMENTUM: pooled(s)}  # the momentum encoder starts as a copy
                losses[index] = probe.loss(s, probe.targets(t, generator))
    return losses
