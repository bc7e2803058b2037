"""Small features and distillers for tests, and plain numpy functions to check them.

B: images. S, T: channels of student and teacher. HEAD: outputs of the teacher's head.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from job.config import Config
from job.distill import DISTILLERS

B, S, T, HEAD = 5, 6, 10, 7


def features(channels, seed, head=0):
    """Return random features of B images before the last ReLU, and of a head if `head`.

    All have gradients: {"layer4": (B, channels, 3, 2), "fc": (B, head)}.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = {"layer4": torch.randn(B, channels, 3, 2, generator=generator).requires_grad_()}
    if head:
        maps["fc"] = torch.randn(B, head, generator=generator).requires_grad_()
    return maps


def build(name, head=0, **options):
    """Build a distiller for a student of S channels, whose framework's head has `head` outputs."""
    torch.manual_seed(0)
    config = Config(distill=[name], **{"loss_share": 0.0, "loss_factor": 1.0} | options)
    teacher = SimpleNamespace(
        norms={4: nn.BatchNorm2d(T)}, widths={4: T, "pooled": T}, head_dim=HEAD
    )
    distiller = DISTILLERS[name](config, {4: S, "pooled": S, "fc": head}, teacher)
    distiller.module.train()
    return distiller


def by_image(maps):
    """Return the pooled features of each image of maps (b, C, H, W), by loops: [(C,)]."""
    return [np.array([np.maximum(channel, 0).mean() for channel in image]) for image in maps]


def unit(vector):
    """Return a vector divided by its length."""
    return vector / np.sqrt((vector * vector).sum())


def array(tensor):
    """Return a tensor as a numpy array in float64."""
    return tensor.detach().double().numpy()


def check_gradient(value, slow):
    """Assert that a tensor's gradient is the slope of slow(array) in a random direction."""
    direction = np.random.default_rng(9).standard_normal(value.shape)
    step = 1e-6 * direction
    slope = (slow(array(value) + step) - slow(array(value) - step)) / 2e-6
    assert (array(value.grad) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-5)
