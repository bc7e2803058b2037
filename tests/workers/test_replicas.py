"""A value that changes on one worker alone is noticed, whatever holds it."""

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


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_moco(comm, "resnet18", dim=16, K=40, mlp=True)


@pytest.fixture
def optimizer(net):
    """One that has taken a step, so that it has momenta."""
    sgd = torch.optim.SGD(net.encoder_q.parameters(), 0.1, momentum=0.9)
    for parameter in net.encoder_q.parameters():
        parameter.grad = torch.ones_like(parameter)
    sgd.step()
    return sgd


def flip(value, place=0):
    """Change the lowest bit of one of a tensor's values."""
    value.detach().view(-1).view(torch.int32)[place] ^= 1


def caught(shared):
    """What the check says on each worker, or nothing."""
    try:
        replicas.check(shared, STEP)
        said = ""
    except RunError as error:
        assert error.code == 1 and "\n" not in str(error)
        said = str(error)
    return allgather(said, "said")


def is_last():
    """Whether this worker is the last of several: the one on which something changes."""
    return 0 < comm.rank() == comm.size() - 1


def assert_named(said, name):
    """All workers say the same: that one tensor differs, which, and where."""
    if comm.size() == 1:
        assert said == [""]
        return
    assert len(set(said)) == 1
    assert f"the workers' networks are not the same {STEP}: 1 of " in said[0]
    assert (
        f"the first is {name}, where worker {comm.size() - 1} has other bytes than worker 0"
        in said[0]
    )


def test_workers_that_agree_pass(net, optimizer):
    assert caught(replicas.shared(net, optimizer)) == [""] * comm.size()


def test_each_worker_has_running_statistics_of_its_own(net):
    net.encoder_q.bn1.running_mean.fill_(comm.rank())
    net.encoder_q.bn1.running_var.fill_(comm.rank())
    assert caught(replicas.shared(net)) == [""] * comm.size()


@pytest.mark.parametrize(
    "name, place",
    [
        ("encoder_q.conv1.weight", 0),
        ("encoder_q.fc.2.bias", 3),
        ("encoder_k.layer4.1.conv2.weight", -1),
        ("queue", 17),
        ("queue_ptr", 0),
    ],
)
def test_a_bit_that_flips_on_one_worker_is_named_on_all(net, name, place):
    if is_last():
        flip(net.state_dict()[name], place)
    assert_named(caught(replicas.shared(net)), name)


def test_a_momentum_that_differs_is_named(net, optimizer):
    if is_last():
        flip(optimizer.state[net.encoder_q.fc.get_submodule("2").bias]["momentum_buffer"], 5)
    assert_named(caught(replicas.shared(net, optimizer)), "momentum_buffer of encoder_q.fc.2.bias")


def test_a_teacher_that_differs_is_named(net, optimizer):
    """All take its gradients alike, so that nothing else would differ."""
    teacher = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    teacher.load_state_dict(
        {name: torch.ones_like(value) for name, value in teacher.state_dict().items()}
    )
    if is_last():
        teacher.weight.data[2, 1, 0, 2] += 1e-3
    distillation = Distillation(None, SimpleNamespace(teacher=Teacher(teacher, {}, "", "")), [])
    parts = SimpleNamespace(trained=net, optimizer=optimizer, distillation=distillation)
    assert_named(caught(Training.shared(parts)), "teacher.weight")


def test_keys_that_change_places_are_noticed(net):
    """The sum of their bytes is what it was."""
    if is_last():
        net.queue.copy_(net.queue.roll(3, dims=1))
    assert_named(caught(replicas.shared(net)), "queue")


def test_two_changes_whose_sum_is_nothing_are_noticed(net):
    words = net.queue.view(-1).view(torch.int32)
    if is_last():
        words[100] += 8
        words[500] -= 8
    assert_named(caught(replicas.shared(net)), "queue")


def test_changes_of_whole_parts_are_noticed():
    """A tensor that is digested in parts: parts that change places are another tensor."""
    value = torch.arange(3 * replicas.PART, dtype=torch.int32)
    parts = value.split(replicas.PART)
    assert replicas.digest(value) != replicas.digest(torch.cat([parts[1], parts[0], parts[2]]))
    assert replicas.digest(value) == replicas.digest(value.clone())


def test_all_that_differs_is_counted_and_the_first_named(net):
    if comm.rank() == 0:
        for name in ("encoder_k.fc.0.bias", "queue", "encoder_q.layer1.0.conv1.weight"):
            flip(net.state_dict()[name])
    for said in caught(replicas.shared(net)):
        if comm.size() > 1:
            assert (
                "3 of " in said and "the first is queue, " in said
            )  # first in the state, as checkpoints have it
            assert f"where worker {0 if comm.size() > 2 else 1} has other bytes" in said
