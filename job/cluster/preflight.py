"""The setting of a run, such as workers and versions, for records and the first log line."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from job import __version__
from job.cluster import comm, task
from job.text import plural

NO_NETWORK = "no network"  # of Gloo, such as of one worker


def setting(device: torch.device) -> dict[str, Any]:
    """Return the run's workers, nodes, launcher, network, device, versions and container image."""
    # Without a GPU, torch.cuda.get_device_name fails.
    on_gpu, threads = device.type == "cuda", torch.get_num_threads()
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU ({plural(threads, 'thread')} each)"
    interface = os.environ.get("HOROVOD_GLOO_IFACE")
    network = NO_NETWORK if interface is None else f"interface {interface}"
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        address = "{HOROVOD_GLOO_RENDEZVOUS_ADDR}:{HOROVOD_GLOO_RENDEZVOUS_PORT}"
        network += f", rendezvous {address.format(**os.environ)}"
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
    workers, nodes, node = setting["workers"], setting["nodes"], task.node()
    launcher, container = setting["launcher"], setting["container"]
    where = f"{nodes} nodes, {comm.local_size()} of them on {node}" if nodes > 1 else node
    started = "no launcher" if launcher == "none" else f"launcher {launcher}"
    network = "" if setting["network"] == NO_NETWORK else setting["network"]
    over = f"NCCL over {setting['nccl']}" if setting.get("nccl") else ""
    parts = [
        f"{plural(workers, 'worker')} on {where}, {started}",
        ", ".join(filter(None, [network, over])),
        f"device {setting['device']}",
        setting["versions"],
        "no container" if container == "none" else f"image {container}",
    ]
    return "; ".join(filter(None, parts))
