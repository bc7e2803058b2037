"""Running statistics of batch norms."""

import torch
from torch import nn

from job.engine.statistics import with_batch_statistics
from job.engine.sync_norm import SynchronisedNorm


def test_with_batch_statistics_copies_the_network():
    """Norms that are synchronised in train mode need no collective there."""
    norms = nn.BatchNorm2d(3), SynchronisedNorm(nn.BatchNorm2d(3), "a")
    net = nn.Sequential(*norms).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = 5 + 2 * torch.randn(4, 3, 2, 2)
    y = with_batch_statistics(net).eval()(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5
    assert y.var((0, 2, 3), correction=0).sub(1).abs().max() < 1e-3
    assert net.training and before.keys() == net.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
