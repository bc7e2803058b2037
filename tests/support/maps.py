"""Random feature maps for tests of distillers."""

import torch


def draw(channels, sides, stages, images=5, mean=0.0):
    """Return {"layerN": (images, C, H, W)} of `stages`, with channels last.

    channels: {stage: C}. sides: {stage: H}. W is max(1, H - 1).
    """
    drawn = {}
    for stage in stages:
        random = torch.Generator().manual_seed(100 * channels[stage] + stage)
        shape = (images, channels[stage], sides[stage], max(1, sides[stage] - 1))
        maps = torch.randn(shape, generator=random) + mean
        drawn[f"layer{stage}"] = maps.contiguous(memory_format=torch.channels_last)
    return drawn
