"""The network between the workers' GPUs, which are simulated."""

import pytest
import torch

from job.cluster import comm, nccl, objects, task
from job.cluster.nccl_network import connect_gpus, describe_networks, slow_network


@pytest.mark.parametrize(
    ("networks", "text"),
    [
        ([("a", "IB (x)"), ("b", "IB (x)")], "IB (x)"),
        ([("a", ""), ("b", "")], "an unknown network"),
        ([("a", "Socket (eth0)")] * 2, ""),
        (
            [("b", "IB"), ("a", "IB"), ("b", "IB"), ("c", "Socket (eth0)")],
            "IB on a, b; Socket (eth0) on c",
        ),
    ],
)
def test_describe_networks_names_nodes_if_they_differ(networks, text):
    assert describe_networks(networks) == text


def test_slow_network_warns_of_unused_infiniband():
    workers = [("a", "IB", []), ("b", "Socket", ["mlx5_0"]), ("b", "Socket", ["mlx5_0"])]
    text = "NCCL uses TCP between nodes, although b has InfiniBand or RoCE (mlx5_0 on b). "
    assert slow_network(workers).startswith(text)
    both = slow_network([*workers, ("c", "Socket", ["mlx5_1"])])
    assert "although b, c have InfiniBand or RoCE (mlx5_0 on b). " in both
    assert slow_network(workers[1:]) == slow_network(workers[:1]) == ""  # one node


@pytest.fixture
def workers(monkeypatch):
    """Simulate two workers with GPUs. Return the list of this one's calls."""
    called = []

    class Sum:
        def cpu(self):
            called.append("computed")

    def total(tensor, name):
        called.append(name)
        return Sum()

    monkeypatch.setattr(torch, "ones", lambda count, device: called.append(device))
    monkeypatch.setattr(comm, "has_nccl", lambda: True)
    monkeypatch.setattr(comm, "total", total)
    monkeypatch.setattr(nccl, "connected", lambda: called.append("network") or "Socket (eth0)")
    monkeypatch.setattr(nccl, "unused_devices", lambda used: ["mlx5_0"])
    monkeypatch.setattr(task, "node", lambda: "b")
    monkeypatch.setattr(objects, "allgather", lambda own, name: [("a", own[1], []), own])
    return called


def test_connect_gpus_connects_before_the_first_step(workers):
    device = torch.device("cuda:1")
    text, slow = connect_gpus(device)
    assert workers == [device, "connect_gpus", "computed", "network"]  # NCCL logs during "computed"
    assert text == "Socket (eth0)" and "although b has InfiniBand or RoCE" in slow


def test_connect_gpus_needs_gpus_and_nccl(workers, monkeypatch):
    assert connect_gpus(torch.device("cpu")) == ("", "")
    monkeypatch.setattr(comm, "has_nccl", lambda: False)
    assert connect_gpus(torch.device("cuda:0")) == ("", "")
    assert workers == []
