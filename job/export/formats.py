"""The formats by name, and by the endings of their files."""

from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from job.export import detectron2, onnx, timm, torchvision
from job.export.network import Network


class Format(NamedTuple):
    """A format.

    write: writes a network with its origin to an open file, and returns what to remark, or "".
    load: returns the statements that load a network from a path. beside: returns {name: content} of
    further files for the folder of the first.
    """

    write: Callable[[BinaryIO, Network, dict], str]
    load: Callable[[Network, str], str]
    beside: Callable[[Network], dict[str, bytes]] = lambda network: {}


ENDINGS = {
    ".pth": "torchvision",
    ".pt": "torchvision",
    ".safetensors": "timm",
    ".pkl": "detectron2",
    ".onnx": "onnx",
}
FORMATS = {
    "torchvision": Format(torchvision.write, torchvision.load),
    "timm": Format(timm.write, timm.load, timm.beside),
    "detectron2": Format(detectron2.write, detectron2.load),
    "onnx": Format(onnx.write, onnx.load),
}
