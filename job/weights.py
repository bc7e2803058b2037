"""Other people's checkpoint files: what is in them, and whether it is what a teacher must be."""

import hashlib
import os
from dataclasses import dataclass

import torch

from job.errors import RunError
from job.run import checkpoint
from moco.encoder import ARCHS, build_resnet

# Beginnings of the md5 sums of MoCo's released files.
RELEASED = {
    "moco_v1_200ep_pretrain.pth.tar": "b251726a",
    "moco_v2_200ep_pretrain.pth.tar": "59fd9945",
    "moco_v2_800ep_pretrain.pth.tar": "a04e12f8",
}
# What stands before a network's own names: MoCo's checkpoints and this program's, without DistributedDataParallel, torchvision's.
PREFIXES = ("module.encoder_q.", "encoder_q.", "")


@dataclass
class Backbone:
    """A ResNet without its head, from a file: its name, first layer, tensors by torchvision's names, and a line of report."""

    arch: str
    stem: str
    state: dict[str, torch.Tensor]
    report: str


def is_moco(content: dict) -> bool:
    """Whether a checkpoint's content is a MoCo model's, this program's or not."""
    state = content.get("state_dict")
    return isinstance(state, dict) and any(key.startswith(PREFIXES[:2]) for key in state)


def read_backbone(path: str, arch: str = "") -> Backbone:
    """Read the (query) encoder without its head from a MoCo checkpoint or a torchvision state dict.

    arch: the network that it must be; by default what the file says, or what its shapes fit.
    RunError: a file that is not whole, not what its name promises, or does not fit to the last tensor.
    """
    check_released(path)
    content = checkpoint.load(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not any(torch.is_tensor(value) for value in state.values()):
        raise RunError(f"{path} holds no network: expected a MoCo checkpoint or a torchvision state dict")
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}conv1.weight" in state), None)
    if prefix is None:
        raise RunError(
            f"{path} holds no ResNet: no {PREFIXES[0]}conv1.weight, nor conv1.weight; its first name is {next(iter(state))}"
        )
    if odd := [key for key in state if not isinstance(key, str)]:
        raise RunError(f"{path}: {odd[0]!r} is no tensor's name")
    named = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    body = {key: value for key, value in named.items() if not key.startswith("fc.")}
    if odd := next((key for key, value in body.items() if not torch.is_tensor(value)), None):
        raise RunError(f"{path}: {odd} is no tensor")
    stem = "small" if body["conv1.weight"].shape[-1:] == (3,) else "imagenet"
    arch = arch or (content["arch"] if content.get("arch") in ARCHS else fitting_arch(path, body, stem))
    if misfits := compare(body, expected_shapes(arch, stem)):
        named = "; ".join(misfits[:3]) + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise RunError(f"{path} does not fit {arch}: {named}. Another --teacher-arch, or another file?")
    if broken := [key for key, value in body.items() if value.is_floating_point() and not torch.isfinite(value).all()]:
        raise RunError(f"{path}: {broken[0]} has values that are not finite ({len(broken)} such tensors): use another file")
    others = len(state) - len(named)
    head = len(named) - len(body)
    origin = f"under {prefix}*" if prefix else "under torchvision's names"
    report = (
        f"{arch} from {path}: {len(body)} tensors {origin} taken, none missing; not needed: {head} of its head, {others} others"
    )
    return Backbone(arch, stem, body, report)


def check_released(path: str) -> None:
    """RunError: a file that has the name of a released one, but another md5."""
    expected = RELEASED.get(os.path.basename(path))
    if not expected or not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if not found.startswith(expected):
        raise RunError(
            f"{path} has md5 {found[:8]}..., the released file {expected}...: download it again, or rename it if it is another"
        )


def expected_shapes(arch: str, stem: str) -> dict[str, torch.Size]:
    """The names and shapes of a network without its head."""
    with torch.device("meta"):
        net = build_resnet(arch, stem=stem)
    return {key: value.shape for key, value in net.state_dict().items() if not key.startswith("fc.")}


def compare(body: dict, expected: dict[str, torch.Size]) -> list[str]:
    """What of `body` is missing, has another shape than expected, or should not be there; in words."""
    counters = "num_batches_tracked"  # absent from files of before torch 0.4.1, and without effect on the output
    missing = [f"{key} is missing" for key in expected if key not in body and not key.endswith(counters)]
    surplus = [f"{key} has no place" for key in body if key not in expected]
    misshapen = [
        f"{key} is {tuple(value.shape)}, expected {tuple(expected[key])}"
        for key, value in body.items()
        if key in expected and value.shape != expected[key]
    ]
    return misshapen + missing + surplus


def fitting_arch(path: str, body: dict, stem: str) -> str:
    """The network whose names and shapes a state dict has. RunError: none has them."""
    for arch in ARCHS:
        if not compare(body, expected_shapes(arch, stem)):
            return arch
    raise RunError(f"{path} fits none of {', '.join(ARCHS)}: name the one it should be with --teacher-arch to see what differs")
