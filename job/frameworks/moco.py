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
from moco.model import Keys, MoCo
from moco.shuffle import Workers

# Shares of ln(K + 1), steps, and percent. Measured on ResNet-18 and the digits, 256 negatives, two workers, 44 steps an epoch.
# A student that learns has 0.90 in the first epoch, 0.81 to 0.85 in the second, 0.24 in the 36th, and an accuracy of 6, 8 to 10
# and 61; at a rate of 0 it has 0.95, then 1.00 and an accuracy of 4.
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
    """Return MoCo, whose query encoder gives the features of `stages` too. first: as `build_network` has it."""
    query, key = (build_network(arch, dim, mlp, **first) for _ in range(2))
    return MoCo(workers, with_features(query, list(stages)), key, dim, K, m, T, normalize)


class MoCoFramework(Framework):
    """MoCo v1 or v2 (moco/model.py)."""

    name = "moco"
    losses = ("contrastive",)
    metrics = ("accuracy",)  # percent of the queries whose own key has the largest logit
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
        """Update the key encoder, and send the key images (B, 3, H, W) to where they are encoded."""
        config = self.config
        counter = (config.seed, "shuffle", *position)
        permutation = randomness.permutation(config.batch_size, *counter)  # (NB,)
        return self.module.keys(views[1], torch.from_numpy(permutation), config.accumulate)

    def forward(self, batch: MicroBatch, prepared: Keys) -> Output:
        """Contrast a micro-batch of queries with its keys."""
        logits, queries, encoded = self.module(batch.images, prepared, batch.part)
        # Logit 0 of each query is its positive.
        positive = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (B,)
        correct = 100.0 * (logits.argmax(1) == 0).sum()  # ()
        others = tuple(self.encoder(images) for images in batch.others)
        loss = F.cross_entropy(logits, positive)
        return Output({"contrastive": loss}, encoded, queries, {"accuracy": correct}, others)

    def after_update(self, prepared: Keys) -> None:
        """Put the step's keys into the queue."""
        self.module.enqueue(prepared.total)

    def signs(self, output: Output) -> dict[str, float]:
        """Return the signs of collapse, with the effective rank of the queue."""
        return super().signs(output) | {"queue_rank": collapse.rank(self.module.queue)}

    def warnings(self, signs: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} of the signs of collapse, with their likely causes."""
        found = collapse.warnings(signs, "--lr or --moco-t is too high")
        if signs["queue_rank"] < RANK:
            found["queue_rank"] = (
                f"the queue's keys are almost identical (effective rank {signs['queue_rank']:.2f} < {RANK}), so they are useless "
                "as negatives: the student has collapsed, or --moco-m is so near to 1 that the key encoder does not follow"
            )
        return found

    def describe(self, numbers: dict[str, float]) -> str:
        """Return the accuracy, for the log."""
        return f"contrast accuracy {numbers['accuracy']:.1f} %"

    def expected(self) -> list[str]:
        """Return the normal course of the loss and the accuracy."""
        return expected(self.config)

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} if the queue is long for so many images."""
        K = self.config.moco_k
        if 4 * K <= images:
            return {}
        sentence = (
            f"the queue has {K} keys, more than a quarter of the {images} images, so that an image meets its "
            f"own old keys as negatives: --moco-k {max(1, images // 4)} or less is better"
        )
        return {"long_queue": sentence}

    def hints(self, means: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} of a loss like that of guessing, or of a task that is too easy."""
        found = {
            "stuck": stuck(self.config, means),
            "solved": solved(self.config, comm.size(), means),
        }
        return {id: hint for id, hint in found.items() if hint}


def expected(config: MoCoOptions) -> list[str]:
    """Return the normal course of the loss and the accuracy."""
    K, guess = config.moco_k, math.log(config.moco_k + 1)
    rises = (
        f" while the learning rate rises (--warmup-epochs {config.warmup_epochs})"
        if config.warmup_epochs
        else ""
    )
    return [
        f"contrastive loss near ln(K + 1) = {guess:.2f}, that of guessing among {K} negatives, once keys have "
        f"filled the queue ({math.ceil(K / config.batch_size)} steps; before, noise is told from a key with ease); it stays "
        f"there{rises or ' for some steps'}, then falls, and so does the gradient norm",
        f"contrast accuracy {100 / (K + 1):.2g} % by chance; of a student that learns, several times that at the end "
        f"of {'its first epoch' if not rises else f'epoch {config.warmup_epochs}'}, and rising",
    ]


def stuck(config: MoCoOptions, means: dict[str, float]) -> str | None:
    """Return a hint if the loss is that of guessing when it should have fallen."""
    guess = math.log(config.moco_k + 1)
    early = means["steps"] < LEARNT or means["epoch"] < max(1, config.warmup_epochs)
    if early or means["contrastive"] < STUCK * guess:
        return None
    return (
        f"the contrastive loss, {means['contrastive']:.2f}, is that of guessing, ln(K + 1) = {guess:.2f}: see whether "
        f"--lr {config.lr:g} is too high (0.03 is for a batch of 256; in proportion, {config.batch_size} have "
        f"{0.03 * config.batch_size / 256:.2g}) or 0, or the images are too much alike"
    )


def solved(config: MoCoOptions, workers: int, means: dict[str, float]) -> str | None:
    """Return a hint if keys are told apart with too much ease to learn from it."""
    guess = math.log(config.moco_k + 1)
    if (
        means["accuracy"] < SOLVED or means["contrastive"] > guess / 2
    ):  # identical keys are found as well
        return None
    alone = (
        "one worker by itself has no other to shuffle batch norm with, through which a query knows its key: use more "
        "workers, or --accumulate 2"
    )
    shortcut = (
        f"see whether views share what tells them apart at once, such as a frame, a stamp or a colour (--aug-plus, a lower "
        f"--crop-min than {config.crop_min:g}), or --moco-k {config.moco_k} is too few negatives"
    )
    cause = alone if workers * config.accumulate == 1 else shortcut
    return (
        f"contrast accuracy {means['accuracy']:.1f} %: the task is too easy to learn from; {cause}"
    )
