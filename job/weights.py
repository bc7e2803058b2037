"""Other people's checkpoints: what is in them, and whether it is the network that is needed."""

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from job.errors import RunError
from job.run.travels import travels
from job.weight_file import read_content
from moco.encoder import ARCHS, WIDTH, WIDTHS, build_resnet


class Layout(NamedTuple):
    """How a kind of checkpoint names its encoder: by torchvision's names behind a prefix, but for the first parts in `places`."""

    name: str
    prefix: str
    places: dict[str, str] = {}

    def key(self, name: str) -> str:
        """The name in the file of what torchvision calls `name`."""
        first, dot, rest = name.partition(".")
        return self.prefix + self.places.get(first, first) + dot + rest


# A ResNet's children without its last one, as nn.Sequential counts them; those between have no tensors.
SEQUENCE = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
# Of several that a file has the first is taken: the exacter ones stand before the laxer ones.
LAYOUTS = (
    Layout("MoCo", "module.encoder_q."),
    Layout("MoCo without DistributedDataParallel", "encoder_q."),
    Layout("SimSiam", "module.encoder."),
    Layout("solo-learn or lightly", "backbone."),
    Layout("lightly, numbered", "backbone.", SEQUENCE),
    Layout("an older solo-learn", "encoder."),
    Layout("SwAV, or torchvision under DistributedDataParallel", "module."),
    Layout("torchvision or timm", ""),
)
# The first parts of names, behind the prefix, that are no backbone's.
HEADS = ("fc", "projection_head", "prototypes", "projector", "predictor", "classifier")


@travels
@dataclass
class Backbone:
    """A ResNet without its head, from a file.

    state: tensors by torchvision's names. report: a line. head: what stood on it there: "linear 512-128",
    "mlp 512-512-128", "none", or "other". meta: "epoch" (None where the file tells none), "config" ({} but for this program's).
    """

    arch: str
    stem: str
    width: int
    state: dict[str, torch.Tensor]
    report: str
    head: str
    meta: dict


def is_moco(content: dict) -> bool:
    """Whether a checkpoint's content is a MoCo model's, this program's or not."""
    state = content.get("state_dict")
    return isinstance(state, dict) and any(str(key).startswith((LAYOUTS[0].prefix, LAYOUTS[1].prefix)) for key in state)


def read_backbone(path: str, arch: str = "", arch_flag: str = "--teacher-arch") -> Backbone:
    """Read the encoder (of two, the one that is trained) without its head, from a checkpoint of any of LAYOUTS.

    arch: the network that it must be; by default what the file says, or what its shapes fit.
    arch_flag: the option that names it, for messages.
    RunError: a file that is not whole, not what its name promises, or does not fit to the last tensor.
    """
    content = read_content(path)
    state = find_state(path, content)
    layout, body = find_body(path, state)
    stem = "small" if body[layout.key("conv1.weight")].shape[-1:] == (3,) else "imagenet"
    width = find_width(body, layout)
    stated = arch or (content["arch"] if content.get("arch") in ARCHS else "")
    arch = stated or nearest_arch(body, layout, stem, width)
    if misfits := compare(body, layout, arch, stem, width):
        first = "; ".join(misfits[:3]) + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        verdict = f"does not fit {arch}" if stated else f"fits no known network, {arch} best"
        raise RunError(f"{path} {verdict}: {first}: use another {arch_flag}, or another file")
    if broken := [key for key, value in body.items() if value.is_floating_point() and not torch.isfinite(value.float()).all()]:
        raise RunError(f"{path}: {broken[0]} has values that are not finite ({len(broken)} such tensors): use another file")
    taken = {name: body[key] for name in expected_shapes(arch, stem, width) if (key := layout.key(name)) in body}
    where = f" under {layout.prefix}*" if layout.prefix else ""
    head = describe_head(state, layout.prefix)
    of_width = "" if width == WIDTH else f" of width {width}"
    report = (
        f"{arch}{of_width} from {path} (layout: {layout.name}): {len(taken)} tensors{where} taken, none missing; "
        f"dropped: {list_dropped(state, body, layout.prefix)} (head: {head})"
    )
    return Backbone(arch, stem, width, taken, report, head, describe_run(content))


def find_state(path: str, content: dict) -> dict:
    """Return the named tensors of a checkpoint. RunError: there are none."""
    state = next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), dict)), content)
    if not any(torch.is_tensor(value) for value in state.values()):
        raise RunError(f"{path} holds no network: expected a checkpoint or a state dict of a ResNet")
    if odd := [key for key in state if not isinstance(key, str)]:
        raise RunError(f"{path}: {odd[0]!r} is no tensor's name: use another file")
    return state


def find_body(path: str, state: dict) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Return the first layout whose first convolution is there, and by the file's names all that is there but the head.

    RunError: no layout's is, or something is no tensor.
    """
    layout = next((layout for layout in LAYOUTS if layout.key("conv1.weight") in state), None)
    if layout is None:
        known = ", ".join(layout.key("conv1.weight") for layout in LAYOUTS)
        raise RunError(f"{path} holds no ResNet: expected one of {known}; its first name is {next(iter(state))}")
    inside = {key: value for key, value in state.items() if key.startswith(layout.prefix)}
    body = {key: value for key, value in inside.items() if key.removeprefix(layout.prefix).split(".")[0] not in HEADS}
    if odd := next((key for key, value in body.items() if not torch.is_tensor(value)), None):
        raise RunError(f"{path}: {odd} is no tensor: use another file")
    return layout, body


def find_width(body: dict, layout: Layout) -> int:
    """The channels of the first stage, which the stem has too; where convolution and norm do not agree, the published 64."""
    stem = [body[key].shape[:1] for name in ("conv1.weight", "bn1.weight") if (key := layout.key(name)) in body]
    return stem[0].numel() if len(set(stem)) == 1 and stem[0].numel() in WIDTHS else WIDTH


@functools.cache
def expected_shapes(arch: str, stem: str, width: int) -> dict[str, torch.Size]:
    """The names and shapes of a network without its head."""
    with torch.device("meta"):
        net = build_resnet(arch, stem=stem, width=width)
    return {key: value.shape for key, value in net.state_dict().items() if not key.startswith("fc.")}


def compare(body: dict, layout: Layout, arch: str, stem: str, width: int) -> list[str]:
    """What of `body` is missing, has another shape than the network's, or should not be there; in words."""
    expected = {layout.key(name): shape for name, shape in expected_shapes(arch, stem, width).items()}
    counters = "num_batches_tracked"  # absent from files of before torch 0.4.1, and without effect on the output
    missing = [f"{key} is missing" for key in expected if key not in body and not key.endswith(counters)]
    surplus = [f"{key} has no place" for key in body if key not in expected]
    misshapen = [
        f"{key} is {tuple(value.shape)}, expected {tuple(expected[key])}"
        for key, value in body.items()
        if key in expected and value.shape != expected[key]
    ]
    integers = [
        f"{key} is {value.dtype}, expected floats"
        for key, value in body.items()
        if key in expected and not value.is_floating_point() and not key.endswith(counters)
    ]
    sparse = [
        f"{key} is {'without values' if value.is_meta else value.layout}, expected a dense tensor"
        for key, value in body.items()
        if value.is_meta or value.layout != torch.strided
    ]
    return misshapen + missing + surplus + integers + sparse


def nearest_arch(body: dict, layout: Layout, stem: str, width: int) -> str:
    """The network whose names and shapes `body` has, or the one from which it differs least."""
    misfits = {}
    for arch in ARCHS:
        misfits[arch] = len(compare(body, layout, arch, stem, width))
        if not misfits[arch]:
            break
    return min(misfits, key=lambda arch: misfits[arch])


def list_dropped(state: dict, body: dict, prefix: str) -> str:
    """How many tensors are not taken, by the first parts of their names: "124 of encoder_k, 4 of fc, 2 others"."""
    short = [key.removeprefix(prefix).removeprefix("module.") for key in state if key not in body]
    shown = Counter(name.split(".")[0] for name in short if "." in name).most_common(6)
    others = len(short) - sum(count for _, count in shown)
    parts = [f"{count} of {first}" for first, count in shown] + [f"{others} other{'s' * (others > 1)}"] * (others > 0)
    return ", ".join(parts) or "nothing"


def describe_head(state: dict, prefix: str) -> str:
    """What stands on the backbone: the widths of its `fc`, or of the projector behind the prefix or beside the backbone."""
    beside = "".join(prefix.removesuffix(".").rpartition(".")[:2])
    projectors = [place + name for place in (prefix, beside) for name in ("projection_head.", "projector.")]
    for start in (f"{prefix}fc.", *projectors):
        inside = [key for key, value in state.items() if key.startswith(start) and torch.is_tensor(value) and value.ndim == 2]
        shapes = [state[key].shape for key in sorted(inside, key=lambda key: [int(part) for part in re.findall(r"\d+", key)])]
        if any(before[0] != after[1] for before, after in itertools.pairwise(shapes)):
            return "other"
        if shapes:
            widths = [shapes[0][1], *(shape[0] for shape in shapes)]
            return f"{'linear' if len(shapes) == 1 else 'mlp'} {'-'.join(map(str, widths))}"
    return "none"


def describe_run(content: dict) -> dict:
    """The epochs that a checkpoint counts, and its options if it is this program's."""
    epoch, config = content.get("epoch"), content.get("config")
    ours = "format" in content and isinstance(config, dict)
    return {"epoch": epoch if type(epoch) is int else None, "config": config if ours else {}}
