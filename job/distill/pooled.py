"""What the distillers of pooled features have in common."""

from collections.abc import Mapping

import torch

from job.networks import DEPTH

HIDDEN = 2048  # width of a head's hidden layer, as published for SEED and DisCo


def pooled(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the pooled features under the head, (b, C) float32, of {"layer4": (b, C, H, W)} before its last ReLU."""
    return features[f"layer{DEPTH}"].relu().mean((2, 3), dtype=torch.float32)
