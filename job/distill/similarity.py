"""Similarity: the student learns the teacher's similarities of an image to other images.

The loss is the mean over the images of -sum_j p_j log q_j, where p = softmax(t D / teacher's
temperature), q = softmax(s D' / student's temperature), and all vectors are normalised.

--similarity seed compares outputs of heads, the teacher's and an MLP on the student (SEED, arXiv
2101.04731). --similarity headless compares pooled features, the student's through a linear layer.
In both, D = D' contains the image's own teacher embedding t and a queue of the teacher's embeddings
of earlier images. --similarity compress compares pooled features without heads (CompRess, arXiv
2010.14713). D is a queue of the teacher's embeddings, and D' a queue of the momentum encoder's
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
    """The published values for a --similarity: queue length and softmax temperatures."""

    k: int
    t: float
    teacher_t: float


SETTINGS = {
    "headless": Setting(8192, 0.07, 0.07),
    "seed": Setting(65536, 0.2, 0.01),
    "compress": Setting(128000, 0.04, 0.04),
}
SIMILARITY = (
    "seed: compare outputs of heads; headless: pooled features, for small sets; "
    "compress: pooled features without a head, with a queue for each network"
)
AS_SET = "(0: the value published for --similarity"
QUEUE = f"images in the queue {AS_SET}: 8192, 65536 or 128000)"
STUDENT_T = f"the student's softmax temperature {AS_SET}: 0.07, 0.2 or 0.04)"
TEACHER_T = f"the teacher's softmax temperature {AS_SET}: 0.07, 0.01 or 0.04)"
M = "momentum of the momentum encoder of --similarity compress"


@dataclass(frozen=True)
class SimilarityOptions(DistillOptions):
    """Distillation of similarities between images."""

    group = "similarity"

    similarity: str = option("headless", SIMILARITY, choices=SETTINGS)
    similarity_k: int = option(0, QUEUE, at_least=0, at_most=2**24)
    similarity_t: float = option(0.0, STUDENT_T, at_least=0.0)
    similarity_teacher_t: float = option(0.0, TEACHER_T, at_least=0.0)
    similarity_m: float = option(0.999, M, at_least=0.0, below=1.0)


class Similarity(Distiller):
    """The cross entropy of an image's similarities to other images in teacher and student."""

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
        self.dims = [dim, width] if two_queues else [dim]  # teacher, momentum encoder
        head: nn.Module
        if seed:
            head = build_mlp(width, config.head_width or HIDDEN, dim)
        else:
            head = nn.Identity() if two_queues else nn.Linear(width, dim)
        self.module.add_module("head", head)
        K = config.similarity_k or published.k
        queue = torch.cat([F.normalize(torch.randn(dim, K), dim=0) for dim in self.dims])
        self.module.register_buffer("queue", queue)  # (d, K), d = sum of `dims`
        self.module.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def needs_head(config: Any) -> bool:
        """Return whether outputs of heads are compared."""
        return config.similarity == "seed"

    @staticmethod
    def momentum(config: Any) -> float | None:
        """Return the momentum of the encoder for the student's queue, or None without one."""
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

        Each network's embeddings are L2-normalised.
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

        With a queue for each network, these are the similarities to its images, (b, K). Otherwise
        (b, 1 + K), and the first similarity is to the image's own teacher embedding.
        """
        first, *second = self.module.get_buffer("queue").split(self.dims)  # (d, K) each
        if second:
            return t @ first, s @ second[0]
        own_t, own_s = ((each * t).sum(1, keepdim=True) for each in (t, s))  # (b, 1)
        return torch.cat([own_t, t @ first], dim=1), torch.cat([own_s, s @ first], dim=1)

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} if the queue is too long for the number of images."""
        K = self.module.get_buffer("queue").shape[1]
        if images > K:
            return {}
        sentence = (
            f"--similarity-k {K}: the queue is not shorter than the set of {images} images, so "
            "it contains old embeddings of the same images. "
            f"Use --similarity-k {max(1, images // 2)} or less"
        )
        return {"long_similarity_queue": sentence}

    def to_gather(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the embeddings for the queue, (b, d)."""
        return targets

    def after_update(self, gathered: torch.Tensor) -> None:
        """Enqueue a step's embeddings (NB, d)."""
        queue, pointer = map(self.module.get_buffer, ("queue", "queue_ptr"))
        enqueue(queue, pointer, gathered)
