"""timm's format: safetensors. timm names the tensors of a ResNet as torchvision does."""

from typing import BinaryIO

import safetensors.torch

from job.export.network import Network
from job.export.origin import as_text
from job.export.torchvision import statements


def write(file: BinaryIO, network: Network, origin: dict) -> str:
    """Write the tensors, with `origin` as metadata."""
    metadata = {"format": "pt", **as_text(origin)}
    file.write(safetensors.torch.save(network.state, metadata=metadata))
    return ""


def load(network: Network, path: str) -> str:
    """Return the statements that load the file."""
    build = f"timm.create_model('{network.arch}', num_classes=0)"
    return statements(build, network, f"safetensors.torch.load_file({path!r})")
