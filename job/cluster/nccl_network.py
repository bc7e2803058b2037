"""Connect the workers' GPUs, describe the network between them, and warn if it is slow."""

from collections.abc import Sequence

import torch

from job.cluster import comm, nccl, objects, task
from job.text import first_names


def connect_gpus(device: torch.device) -> tuple[str, str]:
    """Connect the workers' GPUs by NCCL. A collective.

    Otherwise NCCL would connect them in the first step. Call it when a watchdog runs, because NCCL
    waits forever if its network does not reach the other nodes.
    Returns NCCL's network between nodes, for a log line, and a warning if it is slow. Both are ""
    without NCCL, with one worker or on one node.
    """
    if device.type != "cuda" or not comm.has_nccl():
        return "", ""
    name = "connect_gpus"
    comm.to_host(comm.total(torch.ones(1, device=device), name), name)
    used = nccl.connected()
    workers = objects.allgather((task.node(), used, nccl.unused_devices(used)), "nccl_networks")
    return describe_networks([(node, net) for node, net, _ in workers]), slow_network(workers)


def describe_networks(workers: Sequence[tuple[str, str]]) -> str:
    """Return the workers' networks in one line, with their nodes if they differ.

    workers: (node, network) of each. With one node: "", because NCCL uses no network on a node.
    """
    if len({node for node, _ in workers}) == 1:
        return ""
    nodes: dict[str, set[str]] = {}
    for node, net in workers:
        nodes.setdefault(net or "an unknown network", set()).add(node)
    if len(nodes) == 1:
        return next(iter(nodes))
    return "; ".join(f"{net} on {first_names(sorted(names))}" for net, names in nodes.items())


def slow_network(workers: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Return a warning if NCCL uses TCP between nodes with InfiniBand or RoCE, or "".

    workers: (node, network, unused devices) of each.
    """
    unused = {node: devices for node, _, devices in workers if devices}
    if not unused or len({node for node, *_ in workers}) == 1:
        return ""
    first, devices = next(iter(unused.items()))
    have = "have" if len(unused) > 1 else "has"
    return (
        f"NCCL uses TCP between nodes, although {first_names(sorted(unused))} {have} "
        "InfiniBand or RoCE "
        f"({', '.join(devices)} on {first}). NCCL needs libibverbs, /dev/infiniband and memory to "
        "lock (in Docker --device /dev/infiniband --ulimit memlock=-1); NCCL_DEBUG=INFO prints more"
    )
