"""Comparison of replicas: a value that changes on one worker is an error on all."""

from types import SimpleNamespace

import pytest
import torch

from job.cluster import comm
from job.errors import RunError
from job.engine import replicas
from job.cluster.objects import allgather
from job.distill.distillation import Distillation
from job.distill.teacher import Teacher
from job.training import Training
from job.frameworks.moco import build_moco

STEP = "after epoch 3, step 7"


@pytest.fixture(scope="module")
def built():
    """A network, and a copy of its state."""
    torch.manual_seed(0)
    net = build_moco(comm, "resnet18", dim=16, K=40, mlp=True)
    return net, {name: value.clone() for name, value in net.state_dict().items()}


@pytest.fixture
def net(built):
    """The network in its first state."""
    net, state = built
    net.load_state_dict(state)
    return net


@pytest.fixture
def optimizer(net):
    """An optimizer with momenta, after one step."""
    sgd = torch.optim.SGD(net.encoder_q.parameters(), 0.1, momentum=0.9)
    for parameter in net.encoder_q.parameters():
        parameter.grad = torch.ones_like(parameter)
    sgd.step()
    return sgd


def flip(tensor, index=0):
    """Change the lowest bit of one of a tensor's values."""
    tensor.detach().view(-1).view(torch.int32)[index] ^= 1


def caught(shared):
    """Return the error of the check on each worker, or ""."""
    try:
        replicas.check(shared, STEP)
        text = ""
    except RunError as error:
        assert error.code == 1 and "\n" not in str(error)
        text = str(error)
    return allgather(text, "texts")


def is_last():
    """Return whether this worker is the last of several: the one that a test changes."""
    return 0 < comm.rank() == comm.size() - 1


def assert_named(texts, name):
    """Assert that all workers have the same error, which names one tensor and the last worker."""
    if comm.size() == 1:
        assert texts == [""]
        return
    assert len(set(texts)) == 1
    assert f"the workers' networks differ {STEP}: 1 of " in texts[0]
    assert (
        f"the first is {name}, where worker {comm.size() - 1} has other bytes than worker 0"
        in texts[0]
    )


def test_equal_replicas_pass(net, optimizer):
    assert caught(replicas.shared(net, optimizer)) == [""] * comm.size()


def test_running_statistics_may_differ(net):
    net.encoder_q.bn1.running_mean.fill_(comm.rank())
    net.encoder_q.bn1.running_var.fill_(comm.rank())
    assert caught(replicas.shared(net)) == [""] * comm.size()


@pytest.mark.parametrize(
    "name, index",
    [
        ("encoder_q.conv1.weight", 0),
        ("encoder_q.fc.2.bias", 3),
        ("encoder_k.layer4.1.conv2.weight", -1),
        ("queue", 17),
        ("queue_ptr", 0),
    ],
)
def test_flipped_bit_is_named_on_all_workers(net, name, index):
    if is_last():
        flip(net.state_dict()[name], index)
    assert_named(caught(replicas.shared(net)), name)


def test_different_momentum_is_named(net, optimizer):
    if is_last():
        flip(optimizer.state[net.encoder_q.fc.get_submodule("2").bias]["momentum_buffer"], 5)
    assert_named(caught(replicas.shared(net, optimizer)), "momentum_buffer of encoder_q.fc.2.bias")


def test_different_teacher_is_named(net, optimizer):
    """All workers average its gradients, so no other tensor would differ."""
    teacher = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    teacher.load_state_dict(
        {name: torch.ones_like(value) for name, value in teacher.state_dict().items()}
    )
    if is_last():
        teacher.weight.data[2, 1, 0, 2] += 1e-3
    distillation = Distillation(None, SimpleNamespace(teacher=Teacher(teacher, {}, "", "")), [])
    parts = SimpleNamespace(trained=net, optimizer=optimizer, distillation=distillation)
    assert_named(caught(Training.shared(parts)), "teacher.weight")


def test_swapped_keys_are_noticed(net):
    """The sum of the bytes is the same."""
    if is_last():
        net.queue.copy_(net.queue.roll(3, dims=1))
    assert_named(caught(replicas.shared(net)), "queue")


def test_opposite_changes_are_noticed(net):
    """The sum of the values is the same."""
    values = net.queue.view(-1).view(torch.int32)
    if is_last():
        values[100] += 8
        values[500] -= 8
    assert_named(caught(replicas.shared(net)), "queue")


def test_swapped_parts_have_another_digest():
    """Large tensors are digested in parts."""
    value = torch.arange(3 * replicas.BLOCK, dtype=torch.int32)
    blocks = value.split(replicas.BLOCK)
    assert replicas.digest(value) != replicas.digest(torch.cat([blocks[1], blocks[0], blocks[2]]))
    assert replicas.digest(value) == replicas.digest(value.clone())


def test_differences_are_counted_and_the_first_named(net):
    if comm.rank() == 0:
        for name in ("encoder_k.fc.0.bias", "queue", "encoder_q.layer1.0.conv1.weight"):
            flip(net.state_dict()[name])
    for text in caught(replicas.shared(net)):
        if comm.size() > 1:
            assert "3 of " in text and "the first is queue, " in text  # as in the state's order
            assert f"where worker {0 if comm.size() > 2 else 1} has other bytes" in text
