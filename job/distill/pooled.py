"""Pooled features, and the default width of heads on them."""

from collections.abc import Mapping

import torch

from job.networks import DEPTH, UNDER_HEAD

HIDDEN = 2048  # width of a head's hidden layer, as published for SEED and DisCo


def pooled(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the pooled features under the head, (b, C) float32.

    features: {"layer4": (b, C, H, W)} of a ResNet before its last ReLU, or {"pooled": (b, C)}.
    """
    if UNDER_HEAD in features:
        return features[UNDER_HEAD].float()
    return features[f"layer{DEPTH}"].relu().mean((2, 3), dtype=torch.float32)
