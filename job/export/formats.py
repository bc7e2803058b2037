"""The formats by name, and by the endings of their files."""

from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from job.export import detectron2, onnx, timm, torchvision
from job.export.network import Network


class Format(NamedTuple):
    """A format.

    write: write a network with its origin to an open file, and return a remark, or "".
    load: return the statements that load a network from a path. companions: return {name: content}
    of further files for the folder of the first.
    """

    write: Callable[[BinaryIO, Network, dict], str]
    load: Callable[[Network, str], str]
    companions: Callable[[Network], dict[str, bytes]] = lambda network: {}


ENDINGS = {
    ".pth": "torchvision",
    ".pt": "torchvision",
    ".safetensors": "timm",
    ".pkl": "detectron2",
    ".onnx": "onnx",
}
FORMATS = {
    "torchvision": Format(torchvision.write, torchvision.load),
    "timm": Format(timm.write, timm.load, timm.companions),
    "detectron2": Format(detectron2.write, detectron2.load),
    "onnx": Format(onnx.write, onnx.load),
}
