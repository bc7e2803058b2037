"""A value that changes on one worker alone is noticed, whatever holds it."""

import horovod.torch as hvd
import pytest
import torch

from job.errors import RunError
from job.run import agreement
from moco.model import MoCo

STEP = "after epoch 3, step 7"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return MoCo("resnet18", dim=16, K=40, mlp=True)


def flip(value, place=0):
    """Change the lowest bit of one of a tensor's values."""
    value.detach().view(-1).view(torch.int32)[place] ^= 1


def caught(net):
    """What the check says on each worker, or nothing."""
    try:
        agreement.check(net, STEP)
        said = ""
    except RunError as error:
        assert error.code == 1 and "\n" not in str(error)
        said = str(error)
    return hvd.allgather_object(said, name="said")


def test_workers_that_agree_pass(net):
    assert caught(net) == [""] * hvd.size()


def test_each_worker_has_running_statistics_of_its_own(net):
    net.encoder_q.bn1.running_mean.fill_(hvd.rank())
    net.encoder_q.bn1.running_var.fill_(hvd.rank())
    assert caught(net) == [""] * hvd.size()


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
    last = hvd.size() - 1
    if hvd.rank() == last:
        flip(net.state_dict()[name], place)
    said = caught(net)
    if last == 0:
        assert said == [""]
        return
    assert len(set(said)) == 1
    assert f"the workers' networks are not the same {STEP}: 1 of " in said[0]
    assert f"the first is {name}, where worker {last} has other bytes than worker 0" in said[0]


def test_all_that_differs_is_counted_and_the_first_named(net):
    if hvd.rank() == 0:
        for name in ("encoder_k.fc.0.bias", "queue", "encoder_q.layer1.0.conv1.weight"):
            flip(net.state_dict()[name])
    for said in caught(net):
        if hvd.size() > 1:
            assert "3 of " in said and "the first is queue, " in said  # first in the state, as checkpoints have it
            assert f"where worker {0 if hvd.size() > 2 else 1} has other bytes" in said
