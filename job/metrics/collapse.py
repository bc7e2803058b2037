"""Signs that a student collapses: that it gives, or is about to give, the same features whatever it sees."""

import torch

from job.cluster import comm
from job.metrics.bounds import DEAD, STD


@torch.no_grad()
def signs(embeddings: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the signs of collapse in a forward pass of all workers. A collective.

    embeddings (b, d): L2-normalised. features: {"layerN": (b, S, H, W)}, before the stage's last ReLU; others are ignored.

    feature_std: the embeddings' deviation over the batch, mean over their dimensions, times sqrt(d): 1 if they are spread
        over the sphere, 0 if they are identical (arXiv 2011.10566, section 4.1).
    dead_layerN: the fraction of a stage's channels that are positive nowhere in the batch, so that its last ReLU gives 0.
    """
    q = embeddings.double()  # (b, d)
    n, dim = comm.size() * len(q), q.shape[1]
    stages = {name: maps for name, maps in features.items() if name.startswith("layer")}
    fires = [(maps.amax((0, 2, 3)) > 0).double() for maps in stages.values()]  # (S,) each
    sums = comm.total(torch.cat([q.sum(0), q.square().sum(0), *fires]), "collapse")
    sums = comm.to_host(sums, "collapse")
    first, second, *fires = sums.split([dim, dim, *map(len, fires)])
    variance = (second - first.square() / n).clamp_min(0) / (n - 1)  # (d,)
    found = {"feature_std": variance.sqrt().mean().item() * dim**0.5}
    return found | {
        f"dead_{name}": (fire == 0).double().mean().item()
        for name, fire in zip(stages, fires, strict=True)
    }


@torch.no_grad()
def rank(vectors: torch.Tensor) -> float:
    """Return the effective rank of vectors (d, n), 1 to d.

    It is exp of the entropy of their second moments' eigenvalues (Roy and Vetterli, EUSIPCO 2007). The moments are not about
    the mean: identical vectors have rank 1.
    """
    moments = torch.linalg.eigvalsh((vectors @ vectors.T).double().cpu()).clamp_min(0)  # (d,)
    return torch.special.entr(moments / moments.sum()).sum().exp().item()


@torch.no_grad()
def spectrum_auc(features: torch.Tensor) -> float:
    """Return the area under c_k = (s_1 + ... + s_k) / (s_1 + ... + s_C), as a mean over k.

    s: singular values of the centred features (n, C), the largest first. 0.5: all are equal; 1: one is
    above 0, or none (arXiv 2209.15007). With n under C it is too high.
    """
    centred = features.to(torch.float64, copy=True)  # (n, C)
    centred -= centred.mean(0)
    squares = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp_min(0)  # (C,)
    sums = squares.sqrt().cpu().cumsum(0)  # not each torch has a deterministic one on GPUs
    return (sums / sums[-1]).mean().item() if sums[-1] > 0 else 1.0


def describe(found: dict[str, float]) -> str:
    """Return signs in words: `deviation 0.93 of 1, rank of the queue 61.2, dead channels 0 % of layer4`."""
    words = [f"deviation {found['feature_std']:.2f} of 1"]
    words += [f"rank of the queue {found['queue_rank']:.1f}"] if "queue_rank" in found else []
    dead = ", ".join(
        f"{100 * part:.0f} % of {name.removeprefix('dead_')}"
        for name, part in found.items()
        if "dead" in name
    )
    return ", ".join([*words, f"dead channels {dead}"] if dead else words)


def warnings(found: dict[str, float], cause: str = "--lr is too high") -> dict[str, str]:
    """Return {id: sentence} of the signs that mean collapse.

    cause: the likely cause of identical embeddings.
    """
    sentences = {}
    if found["feature_std"] < STD:
        sentences["same_features"] = (
            f"the student gives nearly the same features for all images (deviation {found['feature_std']:.3f} < {STD}): "
            f"see whether {cause}, or the images are too much alike"
        )
    dead = {
        name: value for name, value in found.items() if name.startswith("dead_") and value > DEAD
    }
    if dead:
        stages = ", ".join(f"{100 * value:.0f} % of {name[5:]}" for name, value in dead.items())
        sentences["dead_channels"] = (
            f"channels are positive for no image, and get no gradient ({stages}): see whether --lr is "
            "too high, or the distillation loss outweighs the others (a higher --loss-factor or a lower "
            "--loss-share)"
        )
    return sentences
