"""The same seed gives the same bytes: sums have a fixed order for any timing of the workers."""

import hashlib
import time

import pytest
import torch

from job.cluster import comm
from job.cluster.objects import allgather
from steps import build_training, save_teacher, train

B, STEPS = 4, 3
STAGES = [3, 4]


def trained(run, folder, delay):
    """Train for STEPS steps, with a pause of `delay` s a stage in this worker's backward pass.

    Return the digests of the state before and after the workers average their batch norms.
    """
    options = {"batch_size": comm.size() * B, "moco_dim": 16, "moco_k": 32, "moco_m": 0.9}
    options |= {"teacher": str(folder.parent / "teacher.pth"), "mgd_stages": STAGES}
    training = build_training(run, folder, **options)
    for stage in STAGES:
        norm = training.framework.encoder.get_submodule(f"layer{stage}.0.bn1")
        norm.weight.register_hook(lambda _: time.sleep(delay))
    random = torch.Generator().manual_seed(10 + comm.rank())
    views = torch.randint(256, (STEPS, 2, B, 3, 32, 32), generator=random, dtype=torch.uint8)
    own = {}
    train(training, list(views), before_average=lambda: own.update(digests(training.trained)))
    return own, digests(training.trained)


def digests(trained):
    """Return the digest of every tensor of a training's state, {name: digest}."""
    state = {name: value.numpy().tobytes() for name, value in trained.state_dict().items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in state.items()}


@pytest.fixture(scope="module")
def trainings(run, tmp_path_factory):
    """Digests of two trainings with different pauses: [worker][training] -> (own, averaged)."""
    folder = tmp_path_factory.mktemp("trainings")
    if comm.rank() == 0:
        save_teacher(folder / "teacher.pth", width=32)
    delays = {"even": 0.0, "uneven": 0.02 * ((comm.rank() * 3) % 4)}
    results = [trained(run, folder / name, delay) for name, delay in delays.items()]
    return allgather(results, "digests")


def test_parameters_and_queue_are_the_same(trainings):
    own = [worker[0][0] for worker in trainings]
    shared = [name for name in own[0] if not name.endswith(("running_mean", "running_var"))]
    assert all(mine[name] == own[0][name] for mine in own for name in shared)


def test_state_is_the_same_after_averaging(trainings):
    averaged = [worker[0][1] for worker in trainings]
    assert all(mine == averaged[0] for mine in averaged)


def test_statistics_differ_while_training(trainings):
    own = [worker[0][0]["moco.encoder_q.bn1.running_mean"] for worker in trainings]
    assert len(set(own)) == comm.size()


def test_bytes_do_not_depend_on_timing(trainings):
    assert all(first == second for first, second in trainings)
