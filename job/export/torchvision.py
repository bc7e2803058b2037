"""torchvision's format: a state dict, written by `torch.save`. For networks of users, too."""

from typing import BinaryIO

import torch

from job.export.network import Network
from job.networks import is_own


def write(file: BinaryIO, network: Network, origin: dict) -> str:
    """Write the state dict, which has only tensors, with `origin` as its attribute."""
    state = network.state
    state.origin = origin  # type: ignore[attr-defined]  # it is an OrderedDict
    torch.save(state, file)
    return ""


def load(network: Network, path: str) -> str:
    """Return the statements that load the file."""
    state = f"torch.load({path!r}, weights_only=True)"
    if is_own(network.arch):
        return statements(f"{network.arch.replace(':', '.')}()", network, state)
    return statements(f"torchvision.models.{network.arch}()", network, f"{state}, strict=False")


def statements(build: str, network: Network, state: str) -> str:
    """Return the statements that build a network, replace its layers and load a state."""
    steps = [f"net = {build}", network.changes, f"net.load_state_dict({state})"]
    return "; ".join(filter(None, steps))
