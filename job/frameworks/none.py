"""No framework: only distillers train the student, with as many views as they need."""

import math
from typing import Any

import torch.nn.functional as F
from torch import nn

from job.errors import RunError
from job.frameworks.base import Framework, MicroBatch, Output
from job.networks import DEPTH, POOLED, with_features


class NoFramework(Framework):
    """A student without a loss of its own."""

    name = "none"
    losses = ()
    # That of published MoCo, so that --loss-share has the same strength.
    reference, reference_text = math.log(65536 + 1), "ln(65537)"

    def __init__(self, config: Any, stages: list[int]):
        """RunError: no distiller reaches the last stage."""
        super().__init__(config, stages)
        if DEPTH not in stages:
            options = " or ".join(f"--{name}-stages" for name in config.distill)
            raise RunError(
                f"--framework none: no distiller trains layer{DEPTH}; expected one of stage "
                f"{DEPTH}. Add {DEPTH} to {options}, or choose another framework"
            )
        self.encoder = with_features(self.network(), stages, output=POOLED)
        self.module = nn.ModuleDict({"encoder_q": self.encoder})

    def forward(self, batch: MicroBatch, prepared: None) -> Output:
        """Run the student on a micro-batch."""
        first, *others = (self.encoder(images) for images in (batch.images, *batch.others))
        # (b, dim) of the first view. `pop` removes the pooled features of all views.
        pooled, *_ = [features.pop(POOLED).detach().float() for features in (first, *others)]
        return Output({}, first, F.normalize(pooled, dim=1), {}, tuple(others))
