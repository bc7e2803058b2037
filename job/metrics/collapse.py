"""Signs of collapse: a student's features become the same for all images."""

import torch

from job.cluster import comm
from job.metrics.bounds import DEAD, STD


@torch.no_grad()
def signs(embeddings: torch.Tensor, features: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the signs of collapse in a forward pass of all workers, by name. A collective.

    embeddings (b, d): L2-normalised. features: {"layerN": (b, S, H, W)}, before the stage's last
    ReLU. Other features are ignored.

    feature_std: standard deviation of the embeddings over the batch, mean over the dimensions,
        times sqrt(d). It is 1 if they are spread over the sphere, and 0 if they are identical
        (arXiv 2011.10566, section 4.1).
    dead_layerN: the fraction of a stage's channels that are nowhere positive in the batch, so the
        stage's last ReLU outputs 0.
    """
    q = embeddings.double()  # (b, d)
    n, dim = comm.size() * len(q), q.shape[1]
    stages = {name: maps for name, maps in features.items() if name.startswith("layer")}
    alive = [(maps.amax((0, 2, 3)) > 0).double() for maps in stages.values()]  # (S,) each
    sums = comm.total(torch.cat([q.sum(0), q.square().sum(0), *alive]), "collapse")
    sums = comm.to_host(sums, "collapse")
    first, second, *alive = sums.split([dim, dim, *map(len, alive)])
    variance = (second - first.square() / n).clamp_min(0) / (n - 1)  # (d,)
    dead = {
        f"dead_{name}": (workers == 0).double().mean().item()  # workers: (S,)
        for name, workers in zip(stages, alive, strict=True)
    }
    return {"feature_std": variance.sqrt().mean().item() * dim**0.5} | dead


@torch.no_grad()
def rank(vectors: torch.Tensor) -> float:
    """Return the effective rank of vectors (d, n), 1 to d.

    It is exp of the entropy of their second moments' eigenvalues (Roy and Vetterli, EUSIPCO 2007).
    The mean is not subtracted, so identical vectors have rank 1.
    """
    moments = torch.linalg.eigvalsh((vectors @ vectors.T).double().cpu()).clamp_min(0)  # (d,)
    return torch.special.entr(moments / moments.sum()).sum().exp().item()


@torch.no_grad()
def spectrum_auc(features: torch.Tensor) -> float:
    """Return the area under c_k = (s_1 + ... + s_k) / (s_1 + ... + s_C), as a mean over k.

    s: singular values of the centred features (n, C), the largest first. The area is 0.5 if all
    are equal, and 1 if at most one is above 0 (arXiv 2209.15007). If n < C, it is too high.
    """
    centred = features.to(torch.float64, copy=True)  # (n, C)
    centred -= centred.mean(0)
    squares = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp_min(0)  # (C,)
    # On the CPU, because some versions of torch have no deterministic cumsum on GPUs.
    sums = squares.sqrt().cpu().cumsum(0)
    return (sums / sums[-1]).mean().item() if sums[-1] > 0 else 1.0


def describe(signs: dict[str, float]) -> str:
    """Return signs for a log line.

    Example: `spread 0.93 (0: all alike, 1: even), rank of the queue 61.2, dead channels 0 % of
    layer4`.
    """
    phrases = [f"spread {signs['feature_std']:.2f} (0: all alike, 1: even)"]
    phrases += [f"rank of the queue {signs['queue_rank']:.1f}"] if "queue_rank" in signs else []
    dead = ", ".join(
        f"{100 * fraction:.0f} % of {name.removeprefix('dead_')}"
        for name, fraction in signs.items()
        if "dead" in name
    )
    return ", ".join([*phrases, f"dead channels {dead}"] if dead else phrases)


def warnings(signs: dict[str, float], cause: str = "--lr is too high") -> dict[str, str]:
    """Return {id: sentence} of the signs that are beyond their bounds.

    cause: the likely cause of identical embeddings.
    """
    sentences = {}
    if signs["feature_std"] < STD:
        sentences["same_features"] = (
            "the student computes nearly the same features for all images (spread "
            f"{signs['feature_std']:.3f} < {STD}). Check whether {cause}, or the images are too "
            "similar"
        )
    dead = {
        name: value for name, value in signs.items() if name.startswith("dead_") and value > DEAD
    }
    if dead:
        stages = ", ".join(f"{100 * value:.0f} % of {name[5:]}" for name, value in dead.items())
        sentences["dead_channels"] = (
            f"channels are positive for no image and get no gradient ({stages}). Check whether "
            "--lr is too high, or the distillation loss outweighs the others. Then raise "
            "--loss-factor or lower --loss-share"
        )
    return sentences
