"""Gradients in buckets, on one worker. tests/workers compares several workers with one."""

import math

import pytest
import torch
from torch import nn

from job.cluster import comm
from job.engine.gradients import Gradients, split
from job.networks import build_resnet


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2)
    )


def loss(net, seed=1):
    return net(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum()


def by_autograd(net, *losses):
    return torch.autograd.grad(sum(losses), list(net.parameters()))


def test_gradients_equal_autograd_s():
    net = network()
    gradients = Gradients(net.named_parameters())
    for seed in (1, 2):  # the second step must not contain the first
        gradients.clear()
        loss(net, seed).backward()
        gradients.wait()
        expected = by_autograd(net, loss(net, seed))
        assert all(
            torch.equal(value.grad, other)
            for value, other in zip(net.parameters(), expected, strict=True)
        )
        torch.testing.assert_close(
            gradients.norm(), torch.cat([value.flatten() for value in expected]).norm()
        )


def test_gradients_of_passes_are_added_and_sent_once(monkeypatch):
    net, sent = network(), []
    send = comm.begin_sum_
    monkeypatch.setattr(
        comm, "begin_sum_", lambda tensor, name: sent.append(name) or send(tensor, name)
    )
    gradients = Gradients(net.named_parameters(), passes=3)
    gradients.clear()
    for seed in range(3):
        assert sent == []
        loss(net, seed).backward()
    gradients.wait()
    assert len(sent) == len(set(sent)) == len(gradients.buckets)
    expected = by_autograd(net, *(loss(net, seed) for seed in range(3)))
    for value, other in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, other)


def test_gradients_are_sent_in_half_precision():
    net = network()
    gradients = Gradients(net.named_parameters(), half=True)
    gradients.clear()
    loss(net).backward()
    assert all(bucket.sent.dtype == torch.float16 for bucket in gradients.buckets)
    gradients.wait()
    for value, other in zip(net.parameters(), by_autograd(net, loss(net)), strict=True):
        assert torch.equal(value.grad, other.half().float())


def test_bucket_is_sent_during_the_backward_pass():
    net = network()
    gradients = Gradients(net.named_parameters())
    gradients.clear()
    sent = []
    net[0].weight.register_post_accumulate_grad_hook(
        lambda _: sent.extend(bucket.sum is not None for bucket in gradients.buckets)
    )
    loss(net).backward()
    assert len(sent) > 1 and all(sent[:-1])
    gradients.wait()


def test_not_finite_names_the_last_layer_first():
    net = network()
    gradients = Gradients(net.named_parameters())
    gradients.clear()
    loss(net).backward()
    gradients.wait()
    assert gradients.not_finite() == []
    for name, value in (
        ("0.weight", math.nan),
        ("2.bias", math.inf),
        ("4.weight", 1e30),  # its square is not finite in float32
    ):
        net.get_parameter(name).grad[0] = value
    assert gradients.not_finite() == ["4.weight", "2.bias", "0.weight"]


def test_clear_releases_memory():
    net = network()
    gradients = Gradients(net.named_parameters())
    gradients.clear()
    loss(net).backward()
    gradients.wait()
    gradients.clear()
    assert all(value.grad is None for value in net.parameters())
    assert all(len(bucket.flat) == 0 and not bucket.views for bucket in gradients.buckets)


def test_wait_refuses_a_missing_gradient():
    net = network()
    gradients = Gradients([*net.named_parameters(), ("unused", nn.Parameter(torch.zeros(3)))])
    gradients.clear()
    loss(net).backward()
    with pytest.raises(RuntimeError, match="the bucket of unused"):
        gradients.wait()


def test_split_ends_with_a_small_bucket():
    named = list(build_resnet("resnet18", mlp=True).named_parameters())[::-1]
    buckets = split(named)
    sizes = [sum(value.numel() for _, value in pairs) for pairs in buckets]
    assert [pair for pairs in buckets for pair in pairs] == named
    assert len(buckets) == 6
    assert all(8 * size >= sum(sizes) for size in sizes[:-1])
    assert 8 * sizes[-1] < sum(sizes)
