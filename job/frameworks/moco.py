"""MoCo as a framework: an adapter around moco/."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.data import randomness
from job.data.augment import normalize
from job.declare import option
from job.frameworks.base import Framework, MicroBatch, Output, first_layers
from job.metrics import collapse
from job.metrics.bounds import RANK
from job.networks import build_network, with_features
from job.options import Options
from job.position import Position
from job.text import plural
from moco.model import Keys, MoCo
from moco.shuffle import Workers

# Steps, a fraction of ln(K + 1), and percent. Measured with ResNet-18 on the digits: 256 negatives,
# two workers, 44 steps an epoch. If the student learns, its loss is 0.90 of ln(K + 1) in the first
# epoch, 0.81 to 0.85 in the second and 0.24 in the 36th, with an accuracy of 6, 8 to 10 and 61.
# At a rate of 0 the loss is 0.95, then 1.00, with an accuracy of 4.
LEARNT, STUCK, SOLVED = 100, 0.98, 99.0


@dataclass(frozen=True)
class MoCoOptions(Options):
    """Momentum Contrast."""

    group = "moco"

    moco_dim: int = option(128, "width of the contrastive features", at_least=1, at_most=2**13)
    moco_k: int = option(65536, "negative keys in the queue", at_least=1, at_most=2**24)
    moco_m: float = option(0.999, "momentum of the key encoder", at_least=0.0, below=1.0)
    moco_t: float = option(0.07, "softmax temperature", above=0.0)
    mlp: bool = option(False, "MoCo v2's head of two layers")


def build_moco(
    workers: Workers,
    arch: str,
    dim: int = 128,
    K: int = 65536,
    m: float = 0.999,
    T: float = 0.07,
    mlp: bool = False,
    stages: list[int] | tuple[int, ...] = (),
    **first: Any,
) -> MoCo:
    """Return MoCo, whose query encoder also returns the features of `stages`.

    K: number of negatives. m: momentum of the key encoder. T: softmax temperature.
    first: further arguments of `build_network`.
    """
    query, key = (build_network(arch, dim, mlp, **first) for _ in range(2))
    return MoCo(workers, with_features(query, list(stages)), key, dim, K, m, T, normalize)


class MoCoFramework(Framework):
    """MoCo v1 or v2 (moco/model.py)."""

    name = "moco"
    losses = ("contrastive",)
    metrics = ("accuracy",)  # percent of queries whose own key has the largest logit
    views, views_name = 2, "query beside key"
    shapes = ("mlp", "moco_dim", "moco_k", "head_width")
    config: MoCoOptions
    module: MoCo

    def __init__(self, config: MoCoOptions, stages: list[int]):
        super().__init__(config, stages)
        first = first_layers(config) | {"head_width": config.head_width}
        self.module = build_moco(
            comm,
            config.arch,
            config.moco_dim,
            config.moco_k,
            config.moco_m,
            config.moco_t,
            config.mlp,
            stages,
            **first,
        )
        self.encoder, self.head_dim = self.module.encoder_q, config.moco_dim
        # The loss of guessing.
        self.reference, self.reference_text = math.log(config.moco_k + 1), "ln(K + 1)"

    def networks(self) -> list[nn.Module]:
        """Return the networks that --compile compiles."""
        return [self.module.encoder_q, self.module.encoder_k]

    def prepare(self, views: list[torch.Tensor], position: Position) -> Keys:
        """Update the key encoder, and send the key images to the workers that encode them."""
        config = self.config
        counter = (config.seed, "shuffle", *position)
        permutation = randomness.permutation(config.batch_size, *counter)  # (NB,)
        return self.module.keys(views[1], torch.from_numpy(permutation), config.accumulate)

    def forward(self, batch: MicroBatch, prepared: Keys) -> Output:
        """Compare a micro-batch of queries with their keys and the queue's negatives."""
        logits, queries, encoded = self.module(batch.images, prepared, batch.index)
        # Logit 0 of each query is its positive.
        positive = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (b,)
        correct = 100.0 * (logits.argmax(1) == 0).sum()  # ()
        others = tuple(self.encoder(images) for images in batch.others)
        loss = F.cross_entropy(logits, positive)
        return Output({"contrastive": loss}, encoded, queries, {"accuracy": correct}, others)

    def after_update(self, prepared: Keys) -> None:
        """Put the step's keys into the queue."""
        self.module.enqueue(prepared.total)

    def signs(self, output: Output) -> dict[str, float]:
        """Return the signs of collapse, and the effective rank of the queue. A collective."""
        return super().signs(output) | {"queue_rank": collapse.rank(self.module.queue)}

    def warnings(self, signs: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} about the signs of collapse, with their likely causes."""
        warnings = collapse.warnings(signs, "--lr or --moco-t is too high")
        if (rank := signs["queue_rank"]) < RANK:
            warnings["queue_rank"] = (
                f"the queue's keys are almost identical (effective rank {rank:.2f} < {RANK}), so "
                "they are useless as negatives: the student has collapsed, or --moco-m is so near "
                "to 1 that the key encoder hardly changes"
            )
        return warnings

    def describe(self, numbers: dict[str, float]) -> str:
        """Return the accuracy, for the log."""
        return f"contrast accuracy {numbers['accuracy']:.1f} %"

    def expected(self) -> list[str]:
        """Return the normal course of the loss and the accuracy."""
        return expected(self.config)

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} if the queue is too long for this number of images."""
        K = self.config.moco_k
        if 4 * K <= images:
            return {}
        sentence = (
            f"the queue has {K} keys, more than a quarter of the {images} images, so an image's "
            f"own old keys are among its negatives: use --moco-k {max(1, images // 4)} or less"
        )
        return {"long_queue": sentence}

    def hints(self, means: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} about a loss of guessing, or a task that is too easy."""
        hints = {
            "stuck": stuck(self.config, means),
            "solved": solved(self.config, comm.size(), means),
        }
        return {id: hint for id, hint in hints.items() if hint}


def expected(config: MoCoOptions) -> list[str]:
    """Return the normal course of the loss and the accuracy."""
    K, guess = config.moco_k, math.log(config.moco_k + 1)
    filled = math.ceil(K / config.batch_size)
    warmup = config.warmup_epochs
    return [
        f"contrastive loss near ln(K + 1) = {guess:.2f}, that of guessing among {K} negatives, "
        f"after {plural(filled, 'step')}, and lower before, while the queue has random keys. "
        f"It falls after {f'--warmup-epochs {warmup}' if warmup else 'some more steps'}",
        f"contrast accuracy {100 / (K + 1):.2g} % by chance, and several times that at the end of "
        f"{f'epoch {warmup}' if warmup else 'the first epoch'}",
    ]


def stuck(config: MoCoOptions, means: dict[str, float]) -> str | None:
    """Return a hint if the loss is still that of guessing when it should have fallen."""
    guess = math.log(config.moco_k + 1)
    early = means["steps"] < LEARNT or means["epoch"] < max(1, config.warmup_epochs)
    if early or means["contrastive"] < STUCK * guess:
        return None
    return (
        f"the contrastive loss, {means['contrastive']:.2f}, is still that of guessing, ln(K + 1) = "
        f"{guess:.2f}: check whether --lr {config.lr:g} is 0 or too high (0.03 for a batch of 256 "
        f"is {0.03 * config.batch_size / 256:.2g} for {config.batch_size}), or whether the images "
        "are too similar"
    )


def solved(config: MoCoOptions, workers: int, means: dict[str, float]) -> str | None:
    """Return a hint if the contrast accuracy is so high that the task is too easy."""
    guess = math.log(config.moco_k + 1)
    # Identical keys have a high accuracy too, but not a low loss.
    if means["accuracy"] < SOLVED or means["contrastive"] > guess / 2:
        return None
    one_worker = (
        "a single worker cannot shuffle batch norm, whose statistics then show a query which key "
        "is its own. Use more workers, or --accumulate 2"
    )
    shortcut = (
        "check whether both views of an image show the same frame, stamp or colour (use "
        f"--aug-plus, or a lower --crop-min than {config.crop_min:g}), or whether --moco-k "
        f"{config.moco_k} is too low"
    )
    cause = one_worker if workers * config.accumulate == 1 else shortcut
    return (
        f"contrast accuracy {means['accuracy']:.1f} %: the task is too easy to learn from; {cause}"
    )
