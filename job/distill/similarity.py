"""Similarity: the student places an image among others as the teacher does.

The loss is the mean over the images of -sum_j p_j log q_j, where p = softmax(t D / teacher's
temperature), q = softmax(s D' / student's temperature), and all vectors are normalised.

--similarity seed compares outputs of heads, the teacher's and an MLP on the student (SEED, arXiv
2101.04731). --similarity headless compares pooled features, the student's through a linear layer.
In both, D = D' has the image's own teacher embedding t and a queue of the teacher's embeddings of
earlier images. --similarity compress compares pooled features without heads (CompRess, arXiv
2010.14713). D has a queue of the teacher's embeddings only, D' one of the momentum encoder's
embeddings of the same images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from job.declare import option
from job.distill.base import Distiller
from job.distill.momentum import MOMENTUM
from job.distill.options import DistillOptions
from job.distill.pooled import HIDDEN, pooled
from job.distill.teacher import Teacher
from job.networks import HEAD, UNDER_HEAD, build_mlp
from moco.queue import enqueue


class Setting(NamedTuple):
    """The published values of a setting."""

    k: int
    t: float
    teacher_t: float


SETTINGS = {
    "headless": Setting(8192, 0.07, 0.07),
    "seed": Setting(65536, 0.2, 0.01),
    "compress": Setting(128000, 0.04, 0.04),
}
SIMILARITY = (
    "what is compared; seed: outputs of heads; headless: pooled features, for small sets; "
    "compress: pooled features without a head, by a queue of each network"
)
AS_SET = "(0: as --similarity has it"
QUEUE = f"images in the queue {AS_SET}, 8192, 65536 or 128000)"
STUDENT_T = f"the student's softmax temperature {AS_SET}, 0.07, 0.2 or 0.04)"
TEACHER_T = f"the teacher's softmax temperature {AS_SET}, 0.07, 0.01 or 0.04)"
M = "momentum of the momentum encoder of --similarity compress"


@dataclass(frozen=True)
class SimilarityOptions(DistillOptions):
    """Similarity to the teacher's embeddings of other images."""

    group = "similarity"

    similarity: str = option("headless", SIMILARITY, choices=SETTINGS)
    similarity_k: int = option(0, QUEUE, at_least=0, at_most=2**24)
    similarity_t: float = option(0.0, STUDENT_T, at_least=0.0)
    similarity_teacher_t: float = option(0.0, TEACHER_T, at_least=0.0)
    similarity_m: float = option(0.999, M, at_least=0.0, below=1.0)


class Similarity(Distiller):
    """Cross entropy of similarities to the teacher's embeddings of other images."""

    name = "similarity"
    shapes = ("similarity", "similarity_k", "head_width")
    batch_statistics = True
    config: SimilarityOptions

    def __init__(self, config: SimilarityOptions, widths: Mapping[Any, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        width, published = widths[UNDER_HEAD], SETTINGS[config.similarity]
        self.t = config.similarity_t or published.t
        self.teacher_t = config.similarity_teacher_t or published.teacher_t
        seed, two_queues = self.needs_head(config), self.momentum(config) is not None
        dim = teacher.head_dim if seed else teacher.widths[UNDER_HEAD]
        self.dims = [dim, width] if two_queues else [dim]  # of the teacher, the momentum encoder
        head: nn.Module
        if seed:
            head = build_mlp(width, config.head_width or HIDDEN, dim)
        else:
            head = nn.Identity() if two_queues else nn.Linear(width, dim)
        self.module.add_module("head", head)
        K = config.similarity_k or published.k
        queue = torch.cat([F.normalize(torch.randn(dim, K), dim=0) for dim in self.dims])
        self.module.register_buffer("queue", queue)  # (d, K), where d is the sum of `dims`
        self.module.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def needs_head(config: Any) -> bool:
        """Return whether outputs of heads are compared."""
        return config.similarity == "seed"

    @staticmethod
    def momentum(config: Any) -> float | None:
        """Return the momentum of the encoder of the student's queue, if there is one."""
        return config.similarity_m if config.similarity == "compress" else None

    @classmethod
    def has_hidden_layer(cls, config: Any, dims: tuple[int, int] | None = None) -> bool:
        """Return whether the student's head is an MLP."""
        return cls.needs_head(config)

    def targets(
        self,
        teacher: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return the teacher's embeddings and the momentum encoder's, if there is one, (b, d).

        Those of each network are normalised.
        """
        embeddings = [teacher[HEAD].float() if self.needs_head(self.config) else pooled(teacher)]
        if self.momentum(self.config) is not None:
            embeddings.append(teacher[MOMENTUM])
        return torch.cat([F.normalize(each, dim=1) for each in embeddings], dim=1)

    def loss(self, student: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, ()."""
        s = self.module.get_submodule("head")(pooled(student)).float()
        s = F.normalize(s, dim=1)  # (b, d)
        t, *_ = targets.split(self.dims, dim=1)  # (b, d)
        with torch.autocast(targets.device.type, enabled=False):
            theirs, ours = self.similarities(t, s)
            loss = F.cross_entropy(ours / self.t, (theirs / self.teacher_t).softmax(1))
        return loss / self.factor.to(loss)

    def similarities(
        self,
        t: torch.Tensor,
        s: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the similarities of the teacher's embeddings t and the student's s, (b, d) each.

        With a queue of each network, they are to the images there, (b, K). Else the first is to the
        image itself, (b, 1 + K).
        """
        first, *second = self.module.get_buffer("queue").split(self.dims)  # (d, K) each
        if second:
            return t @ first, s @ second[0]
        own_t, own_s = ((each * t).sum(1, keepdim=True) for each in (t, s))  # (b, 1)
        return torch.cat([own_t, t @ first], dim=1), torch.cat([own_s, s @ first], dim=1)

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
