"""The network between the workers' GPUs: connect them, describe it, warn if it is a slow one."""

from collections.abc import Sequence

import torch

from job.cluster import comm, nccl, objects, task
from job.text import first_names


def connect_gpus(device: torch.device) -> tuple[str, str]:
    """Connect the workers' GPUs by NCCL. A collective.

    Without this, NCCL would connect them in the first step. Call it with a watchdog, because NCCL
    waits without a limit if its network leads nowhere.
    Returns NCCL's network between nodes, for people, and a warning if it is a slow one; "" and ""
    without NCCL, with one worker or on one node.
    """
    if device.type != "cuda" or not comm.has_nccl():
        return "", ""
    name = "connect_gpus"
    comm.to_host(comm.total(torch.ones(1, device=device), name), name)
    used = nccl.connected()
    found = objects.allgather((task.node(), used, nccl.unused_devices(used)), "nccl_networks")
    return describe_networks([(name, text) for name, text, _ in found]), slow_network(found)


def describe_networks(found: Sequence[tuple[str, str]]) -> str:
    """Return the workers' networks as one text, with their nodes if they differ.

    found: (node, network) of each worker. With one node the text is "": NCCL does not use its
    network there.
    """
    if len({name for name, _ in found}) == 1:
        return ""
    nodes: dict[str, set[str]] = {}
    for name, text in found:
        nodes.setdefault(text or "an unknown network", set()).add(name)
    if len(nodes) == 1:
        return next(iter(nodes))
    return "; ".join(f"{text} on {first_names(sorted(names))}" for text, names in nodes.items())


def slow_network(found: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Return a warning if NCCL uses TCP between nodes that have InfiniBand or RoCE; otherwise "".

    found: (node, network, unused devices) of each worker.
    """
    unused = {node: devices for node, _, devices in found if devices}
    if not unused or len({node for node, *_ in found}) == 1:
        return ""
    first, devices = next(iter(unused.items()))
    have = "have" if len(unused) > 1 else "has"
    return (
        f"NCCL uses TCP between nodes, although {first_names(sorted(unused))} {have} "
        "InfiniBand or RoCE "
        f"({', '.join(devices)} on {first}). NCCL needs libibverbs, /dev/infiniband and memory to "
        "lock (in Docker --device /dev/infiniband --ulimit memlock=-1); NCCL_DEBUG=INFO prints more"
    )
