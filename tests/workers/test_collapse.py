"""Signs of collapse are those of the total batch, whoever holds which of its images."""

import torch
import torch.nn.functional as F

from job.metrics import collapse
from job.cluster import comm
from job.cluster.objects import allgather

DIM, B = 16, 4


def random(*shape):
    """The same numbers on every worker."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def share(values):
    """This worker's part of what all hold together."""
    return values.chunk(comm.size())[comm.rank()]


def test_the_deviation_is_that_of_all_workers_queries():
    q = random(B * comm.size(), DIM)
    found = collapse.signs(F.normalize(share(q), dim=1), {"layer4": torch.ones(B, 3, 2, 2)})
    expected = F.normalize(q, dim=1).double().std(0).mean() * DIM**0.5
    assert abs(found["feature_std"] - expected) < 1e-6


def test_queries_that_differ_only_between_workers_have_no_collapse():
    own = torch.zeros(B, DIM)
    own[:, comm.rank()] = 1
    found = collapse.signs(own, {"layer4": torch.ones(B, 3, 2, 2)})
    assert (found["feature_std"] > 0.1) == (comm.size() > 1)


def test_a_channel_is_dead_if_it_fires_on_no_worker():
    maps = -torch.ones(B, 8, 2, 2)
    maps[-1, comm.rank(), 1, 0] = 1e-6  # each worker has one of its own, in one place
    maps[0, 7] = 0  # not positive
    found = collapse.signs(random(B, DIM), {"layer2": maps, "layer4": -maps})
    assert (found["dead_layer2"], found["dead_layer4"]) == ((8 - comm.size()) / 8, 0)


def test_every_worker_finds_the_same_signs():
    own = torch.randn(B, DIM, generator=torch.Generator().manual_seed(comm.rank()))
    found = collapse.signs(F.normalize(own, dim=1), {"layer4": own[:, :, None, None]})
    assert allgather(found, "signs") == [found] * comm.size()
