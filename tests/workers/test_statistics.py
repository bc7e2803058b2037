"""Running statistics of batch norms: average, gather and load on several workers."""

import pytest
import torch
from torch import nn

from job.cluster import comm
from job.engine import statistics
from job.cluster.objects import allgather


def build(rank):
    """Return a network with the statistics of worker `rank`."""
    generator = torch.Generator().manual_seed(rank)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2, affine=False)),
    )
    with torch.no_grad():
        for value in net.parameters():
            value.fill_(rank)
        for buffer in buffers(net):
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return net


def buffers(net):
    """Return mean, then variance, of each norm, in the order of the network."""
    return [
        value
        for norm in (net[1], net[2][0], net[2][1])
        for value in (norm.running_mean, norm.running_var)
    ]


def flat(net):
    return torch.cat(buffers(net))


@pytest.fixture
def net():
    return build(comm.rank())


def every(value, name):
    return allgather(value, name)


def test_average_is_the_mean_on_all_workers(net):
    statistics.average(net)
    averaged = every(flat(net), "averaged")
    mean = sum(flat(build(rank)).double() for rank in range(comm.size())) / comm.size()
    for mine in averaged:
        assert torch.equal(mine, averaged[0])
        torch.testing.assert_close(mine.double(), mean, rtol=1e-6, atol=0.0)


def test_average_changes_only_running_statistics(net):
    statistics.average(net)
    values = torch.cat([value.detach().flatten() for value in net.parameters()])
    assert every(values.unique().tolist(), "parameters") == [[rank] for rank in range(comm.size())]


def test_average_twice_is_the_same(net):
    statistics.average(net)
    once = flat(net)
    statistics.average(net)
    assert all(every(torch.equal(flat(net), once), "twice"))


def test_gather_has_the_order_of_the_ranks(net):
    expected = torch.stack([flat(build(rank)) for rank in range(comm.size())])
    for rows in every(statistics.gather(net), "rows"):
        assert torch.equal(rows, expected)


def test_load_restores_the_bits_of_a_row(net):
    rows = statistics.gather(net)
    other = (comm.rank() + 1) % comm.size()
    statistics.average(net)
    statistics.load(net, rows[other])
    for rank, loaded in enumerate(every(flat(net), "loaded")):
        assert torch.equal(loaded, flat(build((rank + 1) % comm.size())))
