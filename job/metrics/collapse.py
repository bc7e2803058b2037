"""Signs that a student collapses: that it gives, or is about to give, the same features whatever it sees."""

import torch

from job.cluster import comm
from job.metrics.bounds import DEAD, RANK, STD
from moco.model import MoCo


@torch.no_grad()
def signs(moco: MoCo, features: list[torch.Tensor]) -> dict[str, float]:
    """Return what a step shows of collapse, over all workers, from what it has at hand. A collective: all workers call it.

    features: of `moco.stages` before the last ReLU, (b, S, H, W) each, as the step's last forward pass gave them, whose
        queries count too.

    feature_std: the queries' deviation over the batch, mean over their dim dimensions, times sqrt(dim): 1 where they are spread
        over the sphere, 0 where they are all one (arXiv 2011.10566, section 4.1).
    queue_rank: how many directions the queue's keys take, 1 to dim: exp of the entropy of their second moments' eigenvalues
        (effective rank; Roy and Vetterli, EUSIPCO 2007). Not about the mean: keys that are all one have rank 1.
    dead_layerN: the share of a stage's channels that are positive nowhere in the batch, so that its last ReLU gives nothing.
    """
    q = moco.queries.double()  # (b, dim)
    n, dim = comm.size() * len(q), q.shape[1]
    fires = [(stage.amax((0, 2, 3)) > 0).double() for stage in features]  # (S,) each
    sums = comm.total(torch.cat([q.sum(0), q.square().sum(0), *fires]), "collapse").cpu()
    first, second, *fires = sums.split([dim, dim, *map(len, fires)])
    variance = (second - first.square() / n).clamp_min(0) / (n - 1)  # (dim,)
    moments = torch.linalg.eigvalsh((moco.queue @ moco.queue.T).double().cpu()).clamp_min(0)  # (dim,)
    return {
        "feature_std": variance.sqrt().mean().item() * dim**0.5,
        "queue_rank": torch.special.entr(moments / moments.sum()).sum().exp().item(),
        **{f"dead_layer{stage}": (fire == 0).double().mean().item() for stage, fire in zip(moco.stages, fires, strict=True)},
    }


def describe(found: dict[str, float]) -> str:
    """Signs in words: `deviation 0.93 of 1, rank of the queue 61.2, dead channels 0 % of layer4`."""
    dead = ", ".join(f"{100 * share:.0f} % of {name.removeprefix('dead_')}" for name, share in found.items() if "dead" in name)
    return f"deviation {found['feature_std']:.2f} of 1, rank of the queue {found['queue_rank']:.1f}, dead channels {dead}"


def warnings(found: dict[str, float]) -> list[str]:
    """What of the signs means collapse, and what mostly causes it; a sentence each."""
    said = []
    if found["feature_std"] < STD:
        said.append(
            f"the student gives nearly the same features for all images (deviation {found['feature_std']:.3f}, under {STD}): "
            "see whether --lr or --moco-t is too high, or the images are too much alike"
        )
    if found["queue_rank"] < RANK:
        said.append(
            f"the queue's keys are nearly all one (rank {found['queue_rank']:.2f}, under {RANK}), and as negatives tell nothing: "
            "the student has collapsed, or --moco-m is so near to 1 that the key encoder does not follow"
        )
    for name, share in found.items():
        if name.startswith("dead_") and share > DEAD:
            said.append(
                f"{100 * share:.0f} % of the channels of {name.removeprefix('dead_')} are positive for no image, and get no "
                "gradient: see whether --lr is too high, or the distillation loss outweighs the contrastive one (a higher "
                "--loss-factor or a lower --loss-share)"
            )
    return said
