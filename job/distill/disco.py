"""DisCo (arXiv 2104.09124): the student's embeddings of each view regress the teacher's.

The loss of a view is the mean over images and dimensions of (s - t)^2, where s and t are the
normalised outputs of the heads of student and teacher. The student's head is the framework's if it
has the teacher's number of outputs, otherwise an MLP of the distiller. The run's loss is the mean
over two views. DisCo's loss is 32 times their sum, which is a factor of 1/64. The authors' code
sums over the images of a worker, so its result depends on the number of workers. A mean does not.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from job.distill.base import Distiller
from job.distill.pooled import HIDDEN, pooled
from job.distill.teacher import Teacher
from job.networks import HEAD, UNDER_HEAD, build_mlp


class DisCo(Distiller):
    """Regression of the outputs of the teacher's head."""

    name = "disco"
    views = 2
    batch_statistics = True
    shapes = ("head_width",)

    def __init__(self, config: Any, widths: Mapping[Any, int], teacher: Teacher):
        super().__init__(config, widths, teacher)
        self.shared = not self.has_hidden_layer(config, (widths[HEAD], teacher.head_dim))
        if not self.shared:
            head = build_mlp(widths[UNDER_HEAD], config.head_width or HIDDEN, teacher.head_dim)
            self.module.add_module("head", head)

    @staticmethod
    def needs_head(config: Any) -> bool:
        """Return True, because outputs of heads are compared."""
        return True

    @classmethod
    def has_hidden_layer(cls, config: Any, dims: tuple[int, int] | None = None) -> bool:
        """Return whether the student's head is an MLP of the distiller."""
        return dims is None or dims[0] != dims[1]

    def targets(
        self,
        teacher: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return the outputs of the teacher's head, (b, d), normalised."""
        return F.normalize(teacher[HEAD].float(), dim=1)

    def loss(self, student: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a view, ()."""
        if self.shared:
            s = student[HEAD]  # (b, d)
        else:
            s = self.module.get_submodule("head")(pooled(student))
        loss = F.mse_loss(F.normalize(s.float(), dim=1), targets)
        return loss / self.factor.to(loss)
