"""The setting of a run, such as workers and versions, for records and the first log line."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from job import __version__
from job.cluster import comm, task


def setting(device: torch.device) -> dict[str, Any]:
    """Return the run's workers, nodes, launcher, network, device, versions and container image."""
    # Without a GPU, torch.cuda.get_device_name fails.
    on_gpu, threads = device.type == "cuda", torch.get_num_threads()
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU ({threads} threads each)"
    interface = os.environ.get("HOROVOD_GLOO_IFACE")
    network = "no network" if interface is None else f"interface {interface}"
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        address = "{HOROVOD_GLOO_RENDEZVOUS_ADDR}:{HOROVOD_GLOO_RENDEZVOUS_PORT}"
        network += f" rendezvous {address.format(**os.environ)}"
    return {
        "workers": comm.size(),
        "nodes": comm.nodes(),
        "launcher": task.launched()[0],
        "network": network,
        "device": hardware,
        "versions": f"moco-mgd {__version__}, torch {torch.__version__}, {comm.versions()}",
        "container": os.environ.get("MGD_IMAGE", "none"),
    }


def line(setting: Mapping[str, Any]) -> str:
    """Return the setting of a run as one log line."""
    over = f", NCCL over {setting['nccl']}" if setting.get("nccl") else ""
    workers, nodes, node = setting["workers"], setting["nodes"], task.node()
    where = f"{nodes} nodes, {comm.local_size()} of them on {node}" if nodes > 1 else node
    return (
        f"{workers} worker{'s' * (workers > 1)} on {where}, launcher {setting['launcher']}; "
        f"{setting['network']}{over}; device {setting['device']}; {setting['versions']}; "
        f"image {setting['container']}"
    )
