"""The statistics of batch norms."""

import torch
from torch import nn

from job.engine.statistics import with_batch_statistics
from job.engine.sync_norm import SynchronisedNorm


def test_a_copy_has_the_statistics_of_its_batches_and_the_network_stays_as_it_was():
    """Also of norms that are synchronised in train mode, without a collective."""
    norms = nn.BatchNorm2d(3), SynchronisedNorm(nn.BatchNorm2d(3), "a")
    net = nn.Sequential(*norms).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = 5 + 2 * torch.randn(4, 3, 2, 2)
    found = with_batch_statistics(net).eval()(x)
    assert found.mean((0, 2, 3)).abs().max() < 1e-5
    assert found.var((0, 2, 3), correction=0).sub(1).abs().max() < 1e-3
    assert net.training and before.keys() == net.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
