"""The exported network, with its properties for all formats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from job.checkpoints.foreign import Backbone, read_backbone
from job.data.augment import MEAN, STD
from job.errors import RunError
from job.networks import WIDTH, Encoder, build_resnet, is_own
from job.networks.timm_networks import PREFIX

SMALL_STEM = "net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)"
SMALL_STEM += "; net.maxpool = torch.nn.Identity()"
RESNET = {"global_pool": "avg", "pretrained_cfg": {"first_conv": "conv1", "classifier": "fc"}}
USE_ONNX = "Choose OUTPUT.onnx"
# Height and width, different ones, of a trace for ONNX, and of a check whether a network accepts
# images of any size. In a trace, a layer with a side of 1 would become fixed.
OTHER_SIZE = (96, 128)
SIZE = 224  # side of the training's images in pixels, if the checkpoint has none


@dataclass(frozen=True)
class Network:
    """A network without its head, in eval mode on the CPU.

    arch: its name, as for -a. body: images (B, 3, H, W) -> features (B, C). mean, std:
    of the pixels' values from 0 to 1, by which the images are normalised. size: side of the
    training's images in pixels. fixed_size: it has no other size. details: further JSON
    values by name for its files. changes: statements that replace layers of the other programs'
    network by this one's. refused: {format: reason} of formats that cannot hold it. timm: entries
    of timm's configuration, with "architecture", or {} if timm cannot build the network.
    """

    arch: str
    body: nn.Module
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    fixed_size: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    changes: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    timm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in torchvision, timm or the user's network."""
        return self.body.state_dict()


def read_network(path: str, arch: str, size: int | None) -> tuple[Network, Backbone]:
    """Read a network from a checkpoint, whichever program wrote it.

    arch: the network, or "" for the file's. size: of the images, or None for the run's.
    RunError: the file cannot be used.
    """
    weights = read_backbone(path, arch, arch_flag="--arch")
    size = size or weights.meta["config"].get("image_size") or SIZE
    if not isinstance(size, int) or not 8 <= size <= 4096:
        raise RunError(f"--image-size {size}: expected 8 to 4096. Choose another")
    return build(weights, size), weights


def build(weights: Backbone, size: int) -> Network:
    """Return the network of a checkpoint, for images of `size` pixels."""
    return build_torchvision(weights, size) if weights.is_resnet else build_other(weights, size)


def build_other(weights: Backbone, size: int) -> Network:
    """Return a network of timm, or of a user, for images of `size` pixels."""
    arch, of_user = weights.arch, is_own(weights.arch)
    size = weights.image_size or size
    net = weights.build(size).eval()
    assert isinstance(net, Encoder) and isinstance(net.fc, nn.Linear)
    channels = net.fc.in_features
    fixed = weights.image_size > 0 or (of_user and not accepts_other_sizes(net.body, channels))
    timm: dict[str, Any] = {}
    if not of_user:
        timm["architecture"] = arch.removeprefix(PREFIX).partition(".")[0]
        if fixed:
            timm["model_args"] = {"img_size": size}
    return Network(
        arch,
        net.body,
        channels,
        weights.mean,
        weights.std,
        size,
        fixed_size=fixed,
        refused=refusals_of_other(arch, of_user),
        timm=timm,
    )


@torch.no_grad()
def accepts_other_sizes(body: nn.Module, channels: int) -> bool:
    """Return whether a network, in eval mode, has as many features for images of another size."""
    try:
        return body(torch.zeros(1, 3, *OTHER_SIZE)).shape == (1, channels)
    except Exception:
        return False


def refusals_of_other(arch: str, of_user: bool) -> dict[str, str]:
    """Return {format: reason} of the formats that cannot hold a network of timm or of a user."""
    reasons = {"detectron2": f"detectron2 has no network {arch}. {USE_ONNX}"}
    if of_user:
        return reasons | {"timm": f"timm has no network {arch}. Choose OUTPUT.onnx or OUTPUT.pth"}
    fix = "Choose OUTPUT.safetensors or OUTPUT.onnx"
    return reasons | {"torchvision": f"torchvision has no network {arch}. {fix}"}


def build_torchvision(weights: Backbone, size: int) -> Network:
    """Return a ResNet of torchvision, for images of `size` pixels."""
    arch, stem, width = weights.arch, weights.stem, weights.width
    net = build_resnet(arch, stem=stem, width=width).eval()
    channels = net.fc.in_features
    net.fc = nn.Identity()  # type: ignore[assignment]
    net.load_state_dict(weights.state)
    small = stem == "small"
    return Network(
        arch,
        net,
        channels,
        MEAN,
        STD,
        size,
        details={"stem": stem, "width": width},
        changes=SMALL_STEM if small else "",
        refused=refusals(arch, small, width),
        timm={} if small else {"architecture": arch, **RESNET},
    )


def refusals(arch: str, small: bool, width: int) -> dict[str, str]:
    """Return {format: reason} of the formats that cannot hold a ResNet."""
    if width != WIDTH:
        reason = f"{arch} has {WIDTH} channels in its first stage, this one {width}. {USE_ONNX}"
        return {form: f"{form}'s {reason}" for form in ("torchvision", "timm", "detectron2")}
    if small:
        begin = "begin with a 7x7 convolution and pooling, this one with the small stem"
        return {"detectron2": f"detectron2's ResNets {begin}. {USE_ONNX}"}
    return {}
