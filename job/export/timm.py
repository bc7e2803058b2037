"""timm's format: safetensors and timm's configuration, as in the folders of hubs.

timm names the tensors of a ResNet as torchvision does. `timm.create_model("local-dir:FOLDER")`
reads FOLDER/config.json, and then model.safetensors or the first other .safetensors file there.
"""

import json
from typing import Any, BinaryIO

import safetensors.torch

from job.export.network import Network
from job.export.origin import as_text
from job.export.torchvision import statements

ENDING = ".safetensors"
CONFIG = "config.json"
FROM_FOLDER = "net = timm.create_model('local-dir:.', pretrained=True)"  # in the folder of CONFIG
CROP = 224 / 256  # side of a centre crop over the short side of its image (job/data/augment.py)


def write(file: BinaryIO, network: Network, origin: dict) -> str:
    """Write the tensors, with `origin` as metadata."""
    metadata = {"format": "pt", **as_text(origin)}
    file.write(safetensors.torch.save(network.state, metadata=metadata))
    return ""


def load(network: Network, path: str) -> str:
    """Return the statements that load the file. timm detects safetensors by the ending."""
    if network.timm and path.endswith(ENDING):
        return f"net = {create(network, path)}"
    return statements(create(network), network, f"safetensors.torch.load_file({path!r})")


def create(network: Network, path: str = "") -> str:
    """Return the expression that builds the network in timm, and loads its tensors from a path."""
    name = network.timm.get("architecture", network.arch)
    given = {"num_classes": 0, **network.timm.get("model_args", {})}
    given |= {"checkpoint_path": path} if path else {}
    arguments = ", ".join(f"{argument}={value!r}" for argument, value in given.items())
    return f"timm.create_model({name!r}, {arguments})"


def companions(network: Network) -> dict[str, bytes]:
    """Return {name: content} of the companion files, or {} if timm does not have the network."""
    if not network.timm:
        return {}
    return {CONFIG: (json.dumps(configuration(network), indent=2) + "\n").encode()}


def configuration(network: Network) -> dict[str, Any]:
    """Return timm's configuration of a network, with the pixels and crops of its validation."""
    pixels = {
        "input_size": [3, network.size, network.size],
        "fixed_input_size": network.fixed_size,
        "interpolation": "bilinear",  # as job/data/augment.py
        "crop_pct": CROP,
        "crop_mode": "center",
        "mean": [*network.mean],
        "std": [*network.std],
        "num_classes": 0,
    }
    about = {"num_classes": 0, "num_features": network.channels, **network.timm}
    return about | {"pretrained_cfg": pixels | network.timm.get("pretrained_cfg", {})}
