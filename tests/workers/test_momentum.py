"""Momentum encoders of distillers: N workers against one process, and replica checks.

NB: images of the total batch. K: queue length. M, T: momentum and temperature.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from job.cluster import comm
from job.cluster.objects import allgather
from job.data.augment import normalize
from job.distill.momentum import MOMENTUM
from job.engine import replicas, statistics
from job.errors import RunError
from steps import build_training, save_teacher, train

NB, K, STEPS, M, T = 16, 20, 4, 0.5, 0.1  # the queue wraps
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
PREFIX, QUEUE = f"distillers.{MOMENTUM}.", "distillers.similarity.queue"
TOLERANCE = 1e-3  # fraction of a value's change over the steps


def build(run, folder, accumulate=1):
    """Build a training of CompRess on narrow networks."""
    if comm.rank() == 0:
        save_teacher(folder / "teacher.pth", width=32, arch="resnet18")
    options = {"framework": "none", "distill": ["similarity"], "similarity": "compress", **SGD}
    options |= {"similarity_k": K, "similarity_m": M, "similarity_t": T, "similarity_teacher_t": T}
    options |= {"width": 16, "batch_size": NB, "accumulate": accumulate, "mlp": False}
    options |= {"loss_share": 0.0, "loss_factor": 1.0, "teacher": str(folder / "teacher.pth")}
    return build_training(run, folder / "images", **options)


def views():
    """Return each step's images of the total batch, [(NB, 3, 32, 32) uint8]."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(256, (STEPS, NB, 3, 32, 32), generator=generator, dtype=torch.uint8))


def own(total):
    """Return this worker's images of a total batch."""
    return total.chunk(comm.size())[comm.rank()]


def features(net, images):
    """Return normalised pooled features (NB, C)."""
    return F.normalize(net(images)["layer4"].relu().mean((2, 3)), dim=1)


def emulate(training):
    """Compute the steps in one process. Return student, momentum encoder, queue (C, K)."""
    student, momentum = (copy.deepcopy(training.framework.encoder).eval() for _ in range(2))
    teacher = training.distillation.networks.teacher.net
    queue = training.distillation.distillers[0].module.queue.clone()
    width = teacher(torch.zeros(1, 3, 32, 32))["layer4"].shape[1]
    teacher_queue, student_queue = queue[:width].T.clone(), queue[width:].T.clone()  # (K, C)
    optimizer, pointer = torch.optim.SGD(student.parameters(), **SGD), 0
    for images in map(normalize, views()):
        with torch.no_grad():
            t, m = features(teacher, images), features(momentum, images)
        target = F.softmax(t @ teacher_queue.T / T, dim=1)
        log_p = F.log_softmax(features(student, images) @ student_queue.T / T, dim=1)
        optimizer.zero_grad()
        (-(target * log_p).sum(1).mean()).backward()
        optimizer.step()
        for value, new in zip(momentum.parameters(), student.parameters(), strict=True):
            value.data = M * value.data + (1 - M) * new.data
        for image in range(NB):
            teacher_queue[pointer], student_queue[pointer] = t[image], m[image]
            pointer = (pointer + 1) % K
    return student, momentum, torch.cat([teacher_queue, student_queue], dim=1).T


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_equal_one_process_s(run, tmp_path, accumulate):
    """Networks are in eval mode, because batch statistics depend on the number of workers."""
    training = build(run, tmp_path, accumulate)
    training.trained.eval()
    student, momentum, queue = emulate(training)
    start = {name: value.clone() for name, value in training.trained.state_dict().items()}
    train(training, [[own(images)] for images in views()])
    expected = {QUEUE: queue}
    for prefix, net in (("none.encoder_q.", student), (PREFIX, momentum)):
        expected |= {prefix + name: value.detach() for name, value in net.named_parameters()}
    state, errors = training.trained.state_dict(), {}
    for name, value in expected.items():
        errors[name] = ((state[name] - value).norm() / (value - start[name]).norm()).item()
    everywhere = allgather(max(errors.values()), "errors")
    assert max(everywhere) < TOLERANCE, errors


def test_momentum_encoder_is_compared_between_workers(run, tmp_path):
    """Its running statistics are not compared. A flipped bit is named on all workers."""
    training = build(run, tmp_path)
    spread = {}

    def before_average():
        spread.update(statistics.own_statistics(training.trained))
        spread.update({name: value.clone() for name, value in spread.items()})

    train(training, [[own(images)] for images in views()], before_average)
    norm = f"{PREFIX}bn1.running_mean"
    gathered = allgather(spread[norm].tolist(), "own")
    assert all(mine != gathered[0] for mine in gathered[1:])
    averaged = allgather(training.trained.state_dict()[norm].tolist(), "averaged")
    assert all(mine == averaged[0] for mine in averaged)

    shared = training.shared()
    named = {name.removeprefix(PREFIX) for name in shared if name.startswith(PREFIX)}
    assert "conv1.weight" in named and "bn1.running_mean" not in named
    replicas.check(shared, "now")
    # The optimizer does not have its parameters.
    encoder = training.distillation.momentum.module
    groups = training.optimizer.param_groups
    optimized = {id(value) for group in groups for value in group["params"]}
    assert not any(id(value) in optimized for value in encoder.parameters())
    if 0 < comm.rank() == comm.size() - 1:
        encoder.conv1.weight[0, 0, 0, 0].view(torch.int32).bitwise_xor_(1)
    text = ""
    try:
        replicas.check(shared, "now")
    except RunError as error:
        text = str(error)
    texts = allgather(text, "texts")
    expected = f"the first is {PREFIX}conv1.weight" if comm.size() > 1 else ""
    assert all(expected in each and bool(each) == bool(expected) for each in texts)
