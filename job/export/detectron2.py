"""Detectron2's format: a pickle of arrays by Detectron2's names."""

import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from job.export.network import Network

NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [  # from torchvision's
    (r"^(?=conv|bn)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
]


def write(file: BinaryIO, network: Network, origin: dict) -> str:
    """Write the arrays, and in `origin` the options of Detectron2 that make this network."""
    floats = {name: value for name, value in network.state.items() if value.is_floating_point()}
    content = {
        "model": {rename(name): value.numpy() for name, value in floats.items()},
        "__author__": origin["program"],
        "matching_heuristics": True,
        "origin": origin | {"detectron2": options(network)},
    }
    # Older Pythons read protocol 4. NumPy 1 cannot read the arrays that NumPy 2 pickles by default.
    pickler = pickle.Pickler(file, protocol=4)
    pickler.dispatch_table = {np.ndarray: portable}
    pickler.dump(content)
    return ""


def portable(array: np.ndarray) -> tuple:
    """Return the pickle of a float32 array, for any version of NumPy."""
    return np.ndarray, (array.shape, "float32", bytearray(array))


def load(network: Network, path: str) -> str:
    """Return the statement that sets Detectron2's options for the file."""
    return f"cfg.merge_from_list({['MODEL.WEIGHTS', path, *options(network)]!r})"


def options(network: Network) -> list[Any]:
    """Return Detectron2's options of a ResNet, alternately a name and its value."""
    net: Any = network.body
    depth = int(re.findall(r"\d+", network.arch)[0])
    items = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_IN_1X1", False]
    items += ["MODEL.RESNETS.NUM_GROUPS", net.groups]
    items += ["MODEL.RESNETS.WIDTH_PER_GROUP", net.base_width]
    items += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64] if depth < 50 else []
    for name, values in (("MEAN", network.mean), ("STD", network.std)):
        items += [f"MODEL.PIXEL_{name}", [round(255 * value, 3) for value in values]]
    return [*items, "INPUT.FORMAT", "RGB"]


def rename(name: str) -> str:
    """Return Detectron2's name of a tensor: res2.0.conv2.norm.bias of layer1.0.bn2.bias."""
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name
