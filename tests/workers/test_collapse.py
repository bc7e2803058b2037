"""Signs of collapse are computed over the total batch."""

import torch
import torch.nn.functional as F

from job.metrics import collapse
from job.cluster import comm
from job.cluster.objects import allgather

DIM, B = 16, 4


def random(*shape):
    """Return the same numbers on every worker."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def own(total):
    """Return this worker's rows of a total batch."""
    return total.chunk(comm.size())[comm.rank()]


def test_deviation_is_over_all_workers_queries():
    q = random(B * comm.size(), DIM)
    signs = collapse.signs(F.normalize(own(q), dim=1), {"layer4": torch.ones(B, 3, 2, 2)})
    expected = F.normalize(q, dim=1).double().std(0).mean() * DIM**0.5
    assert abs(signs["feature_std"] - expected) < 1e-6


def test_deviation_between_workers_counts():
    queries = torch.zeros(B, DIM)
    queries[:, comm.rank()] = 1
    signs = collapse.signs(queries, {"layer4": torch.ones(B, 3, 2, 2)})
    assert (signs["feature_std"] > 0.1) == (comm.size() > 1)


def test_channel_is_dead_if_it_fires_on_no_worker():
    maps = -torch.ones(B, 8, 2, 2)
    maps[-1, comm.rank(), 1, 0] = 1e-6  # one positive value a worker, each in another channel
    maps[0, 7] = 0  # not positive
    signs = collapse.signs(random(B, DIM), {"layer2": maps, "layer4": -maps})
    assert (signs["dead_layer2"], signs["dead_layer4"]) == ((8 - comm.size()) / 8, 0)


def test_signs_are_the_same_on_every_worker():
    queries = torch.randn(B, DIM, generator=torch.Generator().manual_seed(comm.rank()))
    signs = collapse.signs(F.normalize(queries, dim=1), {"layer4": queries[:, :, None, None]})
    assert allgather(signs, "signs") == [signs] * comm.size()
