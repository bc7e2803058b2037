"""Small features, teachers and images for tests of distillers, and numpy's view of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from job.config import Config
from job.distill import DISTILLERS

B, S, T, HEAD = (
    5,
    6,
    10,
    7,
)  # images; channels of student and teacher; outputs of the teacher's head


def features(channels, seed, head=0):
    """Features of B images before the last ReLU, with gradients, and outputs of a head if `head`."""
    generator = torch.Generator().manual_seed(seed)
    found = {"layer4": torch.randn(B, channels, 3, 2, generator=generator).requires_grad_()}
    if head:
        found["fc"] = torch.randn(B, head, generator=generator).requires_grad_()
    return found


def build(name, head=0, **options):
    """A distiller of a student of S channels, whose framework's head has `head` outputs."""
    torch.manual_seed(0)
    config = Config(distill=[name], **{"loss_share": 0.0, "loss_factor": 1.0} | options)
    teacher = SimpleNamespace(
        norms={4: nn.BatchNorm2d(T)}, widths={4: T, "pooled": T}, head_dim=HEAD
    )
    distiller = DISTILLERS[name](config, {4: S, "pooled": S, "fc": head}, teacher)
    distiller.module.train()
    return distiller


def by_image(maps):
    """Pooled features of each image of maps (b, C, H, W), by loops: [(C,)]."""
    return [np.array([np.maximum(channel, 0).mean() for channel in image]) for image in maps]


def unit(vector):
    """A vector of length 1."""
    return vector / np.sqrt((vector * vector).sum())


def array(tensor):
    """A tensor in float64."""
    return tensor.detach().double().numpy()


def check_gradient(value, slow):
    """The gradient of a tensor is the slope of slow(array) along a random direction."""
    direction = np.random.default_rng(9).standard_normal(value.shape)
    step = 1e-6 * direction
    slope = (slow(array(value) + step) - slow(array(value) - step)) / 2e-6
    assert (array(value.grad) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-5)
