"""Similarity: the student places an image among others as the teacher does.

The loss is the mean over the images of -sum_j p_j log q_j, where p = softmax(t D / teacher's
temperature), q = softmax(s D / student's temperature), and all vectors are normalised. D has the
image's own teacher embedding t and the teacher's embeddings of earlier images, a queue.

--similarity seed compares outputs of heads, the teacher's and an MLP on the student (SEED, arXiv
2101.04731). --similarity headless compares pooled features, the student's through a linear layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from job.declare import option
from job.distill.base import Distiller, DistillOptions
from job.distill.pooled import HIDDEN, pooled
from job.distill.teacher import Teacher
from job.networks import DEPTH, HEAD, build_mlp
from moco.queue import enqueue


class Setting(NamedTuple):
    """The published values of a setting."""

    k: int
    t: float
    teacher_t: float


SETTINGS = {"headless": Setting(8192, 0.07, 0.07), "seed": Setting(65536, 0.2, 0.01)}
SIMILARITY = "what is compared; seed: outputs of heads; headless: pooled features, for small sets"
AS_SET = "(0: as --similarity has it"


@dataclass(frozen=True)
class SimilarityOptions(DistillOptions):
    """Similarity to the teacher's embeddings of other images."""

    group = "similarity"

    similarity: str = option("headless", SIMILARITY, choices=SETTINGS)
    similarity_k: int = option(0, f"teacher's embeddings in the queue {AS_SET}, 8192 or 65536)", at_least=0, at_most=2**24)
    similarity_t: float = option(0.0, f"the student's softmax temperature {AS_SET}, 0.07 or 0.2)", at_least=0.0)
    similarity_teacher_t: float = option(0.0, f"the teacher's softmax temperature {AS_SET}, 0.07 or 0.01)", at_least=0.0)


class Similarity(Distiller):
    """Cross entropy of similarities to the teacher's embeddings of other images."""

    name = "similarity"
    shapes = ("similarity", "similarity_k", "head_width")
    batch_statistics = True
    config: SimilarityOptions

    def __init__(self, config: SimilarityOptions, widths: Mapping[int, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        width, published = widths[DEPTH], SETTINGS[config.similarity]
        self.t = config.similarity_t or published.t
        self.teacher_t = config.similarity_teacher_t or published.teacher_t
        if self.needs_head(config):
            dim = teacher.head_dim
            head: nn.Module = build_mlp(width, config.head_width or HIDDEN, dim)
        else:
            dim = teacher.norms[DEPTH].num_features
            head = nn.Linear(width, dim)
        self.module.add_module("head", head)
        queue = F.normalize(torch.randn(dim, config.similarity_k or published.k), dim=0)
        self.module.register_buffer("queue", queue)  # (d, K)
        self.module.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def needs_head(config: Any) -> bool:
        """Return whether outputs of heads are compared."""
        return config.similarity == "seed"

    @classmethod
    def has_hidden_layer(cls, config: Any, dims: tuple[int, int] | None = None) -> bool:
        """Return whether the student's head is an MLP."""
        return cls.needs_head(config)

    def targets(
        self,
        teacher: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return the teacher's embeddings, (b, d), normalised."""
        embeddings = teacher[HEAD].float() if self.needs_head(self.config) else pooled(teacher)
        return F.normalize(embeddings, dim=1)

    def loss(self, student: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, ()."""
        s = self.module.get_submodule("head")(pooled(student)).float()
        s = F.normalize(s, dim=1)  # (b, d)
        with torch.autocast(targets.device.type, enabled=False):
            wanted = self.similarities(targets, targets, self.teacher_t).softmax(1)  # (b, 1 + K)
            loss = F.cross_entropy(self.similarities(s, targets, self.t), wanted)
        return loss / self.factor.to(loss)

    def similarities(self, vectors: torch.Tensor, own: torch.Tensor, t: float) -> torch.Tensor:
        """Return the similarities of vectors to their own images and to the queue, (b, 1 + K), over t.

        own: the teacher's embeddings of the same images, (b, d).
        """
        first = (vectors * own).sum(1, keepdim=True)  # (b, 1)
        return torch.cat([first, vectors @ self.module.get_buffer("queue")], dim=1) / t

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} if the queue is long for so many images."""
        K = self.module.get_buffer("queue").shape[1]
        if images > K:
            return {}
        sentence = (
            f"the queue of similarity has {K} embeddings for {images} images, so that an image meets "
            f"its own old embedding: --similarity-k {max(1, images // 2)} or less is better"
        )
        return {"long_similarity_queue": sentence}

    def remembered(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the embeddings for the queue."""
        return targets

    def after_update(self, remembered: torch.Tensor) -> None:
        """Put a step's embeddings (B, d) into the queue."""
        queue, pointer = map(self.module.get_buffer, ("queue", "queue_ptr"))
        enqueue(queue, pointer, remembered)
