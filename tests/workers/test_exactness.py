"""The same bytes from the same seed: sums have a fixed order, whatever the workers' timing."""

import hashlib
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.engine.gradients import Gradients
from job.engine import statistics
from job.cluster.objects import allgather
from mgd.distiller import MGDistiller
from job.networks import stage_norms
from job.frameworks.moco import build_moco

B, STEPS = 4, 3
STAGES = [3, 4]


def train(delay):
    """Train a student for STEPS steps from fixed weights; every worker's backward pass pauses by `delay` s a stage."""
    torch.manual_seed(0)
    moco = build_moco(comm, "resnet18", dim=16, K=32, m=0.9, T=0.2, mlp=True, stages=STAGES)
    norms = stage_norms(moco.encoder_k)
    distiller = MGDistiller({stage: (norms[stage].num_features, 2 * norms[stage].num_features) for stage in STAGES})
    trained = nn.ModuleDict({"moco": moco, "mgd": distiller})
    named = [(name, value) for name, value in trained.named_parameters() if value.requires_grad]
    sgd = torch.optim.SGD([value for _, value in named], lr=0.03, momentum=0.9, weight_decay=1e-4)
    gradients = Gradients(named)
    for stage in STAGES:
        norm = moco.encoder_q.get_submodule(f"layer{stage}.0.bn1")
        norm.weight.register_hook(lambda _: time.sleep(delay))

    own = torch.Generator().manual_seed(10 + comm.rank())
    common = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        query, key = torch.randint(256, (2, B, 3, 32, 32), generator=own, dtype=torch.uint8)
        keys = moco.keys(key, torch.randperm(comm.size() * B, generator=common))
        logits, _, encoded = moco(query, keys)
        features = [encoded[f"layer{stage}"] for stage in STAGES]
        guide = [torch.randn(B, 2 * s.shape[1], *s.shape[2:], generator=own) for s in features]
        loss = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)) + distiller(features, distiller.targets(guide))
        gradients.clear()
        loss.backward()
        gradients.wait()
        sgd.step()
        moco.enqueue(keys.total)
    return trained


def digests(trained):
    """A digest of every tensor of a training's state, {name: digest}."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in trained.state_dict().items()}


@pytest.fixture(scope="module")
def trainings():
    """Of two trainings, each worker's digests before and after the workers have averaged their batch norms."""
    found = []
    for delay in (0.0, 0.02 * ((comm.rank() * 3) % 4)):
        trained = train(delay)
        own = digests(trained)
        statistics.average(trained)
        found.append((own, digests(trained)))
    return allgather(found, "digests")  # [worker][training] -> (own, averaged)


def test_workers_have_the_same_parameters_and_queue_after_a_training(trainings):
    own = [worker[0][0] for worker in trainings]
    shared = [name for name in own[0] if not name.endswith(("running_mean", "running_var"))]
    assert all(mine[name] == own[0][name] for mine in own for name in shared)


def test_workers_have_the_same_state_once_their_statistics_are_averaged(trainings):
    averaged = [worker[0][1] for worker in trainings]
    assert all(mine == averaged[0] for mine in averaged)


def test_batch_norm_statistics_are_each_workers_own_while_training(trainings):
    own = [worker[0][0]["moco.encoder_q.bn1.running_mean"] for worker in trainings]
    assert len(set(own)) == comm.size()


def test_a_training_ends_in_the_same_bytes_whatever_the_workers_timing(trainings):
    assert all(first == second for first, second in trainings)
