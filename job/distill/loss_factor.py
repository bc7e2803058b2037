"""The loss factor that --loss-share asks for, measured at a run's start: all workers measure, and all get the same factor."""

import copy
import math
import time

import torch

from job.cluster import comm
from job.data import randomness
from job.data.folders import every_nth_batch
from job.distill.mgd import BATCH
from job.engine.passes import centre_crops, evaluating
from job.engine.state import Training
from job.errors import RunError

BATCHES = 8  # of BATCH images, or as many as there are


def set_factor(training: Training) -> None:
    """Set the loss factor so that the distillation loss is --loss-share times ln(K + 1), and log it. A collective.

    Both are of the start: ln(K + 1) is the contrastive loss of guessing, and the distillation loss is measured, so that the
    share means the same for any image size, batch and teacher. The factor is the same, to the bit, for any number of workers
    with equally many threads.

    RunError, on all workers: no factor gives that share. Stopped, on all workers: a signal came;
    nothing is changed.
    """
    run, config, distiller = training.run, training.config, training.distiller
    assert distiller
    begun = time.perf_counter()
    order = randomness.permutation(len(training.images), config.seed, "refresh").tolist()
    whole = len(order) // BATCH * BATCH or len(order)  # a batch cut short to one image has no batch statistics
    sample = order[: min(whole, BATCHES * BATCH)]
    losses = measure(training, sample)  # (n,)
    raw = comm.total(losses, "scale").cpu().mean().item()
    wanted = config.loss_share * math.log(config.moco_k + 1)
    factor = raw / wanted if wanted else math.inf
    if not 0 < factor < math.inf:
        raise RunError(
            f"--loss-share {config.loss_share:g}: the distillation loss of {len(sample)} images is {raw:g} at the start, "
            "which no factor brings there: expected a finite number above 0; see whether the teacher is sound, or give "
            "--loss-factor",
            code=1,
        )
    distiller.factor.fill_(factor)
    run.log.line(
        f"loss factor {factor:.6g}: the distillation loss of {len(sample)} images is {raw:.6g} an image, and is to be "
        f"{config.loss_share:g} of ln(K + 1), {wanted:.4g}; measuring {time.perf_counter() - begun:.1f} s"
    )
    run.log.record(epoch=0, step=0, loss_factor=factor, raw_distillation=raw, measuring=time.perf_counter() - begun)


@torch.no_grad()
def measure(training: Training, sample: list[int]) -> torch.Tensor:
    """Return the distillation loss an image at a factor of 1, (n,) float64, of each of `sample`'s n batches.

    Those that other workers measure are 0, so that their sum over the workers is exact in any order. The student is in eval
    mode, and the BN_i are a copy's that take each batch's statistics: the student's own scale does not matter, and nothing of
    the run changes.

    A collective. RunError, on all workers: too many images cannot be decoded.
    """
    run, config, student, teacher = training.run, training.config, training.moco.encoder_q, training.teacher
    assert training.distiller and teacher
    distiller = copy.deepcopy(training.distiller).train()
    distiller.factor.fill_(1.0)
    names = [f"layer{stage}" for stage in distiller.stages]
    losses = torch.zeros(len(every_nth_batch(sample, BATCH, 0, 1)), dtype=torch.float64, device=run.device)
    drop = torch.Generator(run.device)
    with evaluating(student):
        crops = centre_crops(training.images, sample, BATCH, config, run, "loss factor")
        for number, (inputs, _) in enumerate(crops):
            place = run.rank + number * run.size
            drop.manual_seed(randomness.torch_seed(config.seed, "drop", epoch=0, step=place, sample=0))
            with run.autocast(config.precision):
                s, t = student(inputs), teacher(inputs)
                targets = distiller.targets([t[name] for name in names], drop)
                losses[place] = distiller([s[name] for name in names], targets)
    return losses
