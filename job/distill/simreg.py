"""SimReg (arXiv 2201.05131): the student's pooled features regress the teacher's, through a head.

The loss is the mean over the images of |h(g_s) - g_t|^2 for normalised vectors, which is 2 - 2 cos,
from 0 to 4. The head h is trained and saved in checkpoints. The exported student does not have it.
Its batch norms use the statistics of a worker's micro-batch, like the student's.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from job.distill.base import Distiller
from job.distill.pooled import pooled
from job.distill.teacher import Teacher
from job.networks import UNDER_HEAD, hidden_layer


def build_head(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the head h, (b, width) -> (b, outputs): two MLPs in sequence."""
    first = [*hidden_layer(width, hidden), nn.Linear(hidden, width)]
    return nn.Sequential(*first, *hidden_layer(width, hidden), nn.Linear(hidden, outputs))


class SimReg(Distiller):
    """Regression of the teacher's pooled features."""

    name = "simreg"
    shapes = ("head_width",)

    def __init__(self, config: Any, widths: Mapping[Any, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        width, outputs = widths[UNDER_HEAD], teacher.widths[UNDER_HEAD]
        head = build_head(width, config.head_width or 2 * width, outputs)
        self.module.add_module("head", head)

    def targets(
        self,
        teacher: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return the teacher's pooled features, (b, T)."""
        return pooled(teacher)

    def loss(self, student: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, ()."""
        predicted = self.module.get_submodule("head")(pooled(student)).float()  # (b, T)
        distances = 2 - 2 * F.cosine_similarity(predicted, targets)  # (b,)
        return distances.mean() / self.factor.to(distances)
