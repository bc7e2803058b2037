"""Other people's checkpoints: what is in them, and whether it is the network that is needed."""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from job.checkpoints import hub
from job.checkpoints.foreign_file import read_content
from job.checkpoints.layouts import Layout, find_networks, outline
from job.checkpoints.other_networks import (
    BODY,
    SIZE_FLAG,
    SIZES,
    find_needs,
    find_other_body,
    other_network,
    use_another,
)
from job.cluster.travels import travels
from job.data.augment import MEAN, STD
from job.errors import RunError
from job.networks import ARCHS, WIDTH, WIDTHS, Encoder, Input, Network, build_network, build_resnet

# The first parts of names, behind the prefix, that are no backbone's.
HEADS = (
    "fc", "projection_head", "prototypes", "projector", "predictor", "classifier", "linear", "last_linear", "head", "heads",
)  # fmt: skip
# Facts of a run in this program's checkpoints, beside "epoch" and "config". step: steps of the next
# epoch that are done. teacher: digest of its weights, or "".
FACTS = {"step": int, "workers": int, "images": int, "teacher": str}
UNUSED = ("total_ops", "total_params")  # counters that the profiler thop leaves in each module


@travels
@dataclass
class Backbone:
    """A network from a file, its head apart.

    arch: its name, as -a takes it. state: tensors by torchvision's names; of other networks, by their own after "body.".
    report: a line. head: what stood on it there: "linear 512-128",
    "mlp 512-512-128", "none", or "other". meta: "epoch" (None where the file tells none), "config" ({} but for this program's).
    head_state: the head's tensors, by names such as "weight" or "0.weight". run: other facts of a
    run of this program, as far as the file has them: FACTS.
    image_size: side of the images that the network demands; 0: any. mean, std: of its images' colours.
    """

    arch: str
    stem: str
    width: int
    state: dict[str, torch.Tensor]
    report: str
    head: str
    meta: dict
    head_state: dict[str, torch.Tensor] = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    image_size: int = 0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def is_resnet(self) -> bool:
        """Whether it is a ResNet of torchvision, which has a stem and a width."""
        return self.arch in ARCHS

    @property
    def input(self) -> dict:
        """What the network demands of its images, as `image_size`, `mean` and `std`."""
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def build(self, image_size: int = 224) -> Network:
        """Return the network with an untrained head, for images normalised by ImageNet's mean.

        image_size: of the images, if the network does not demand one. RunError: it does not take them.
        """
        size = self.image_size or image_size
        net = build_network(self.arch, stem=self.stem, width=self.width, image_size=size)
        net.load_state_dict(self.state, strict=False)  # only the head is missing
        if isinstance(net, Encoder):
            colours = list(zip(MEAN, STD, self.mean, self.std, strict=True))
            scale = tuple(ours / own for _, ours, _, own in colours)
            shift = tuple((m - own) / std for m, _, own, std in colours)
            net.input = Input(self.image_size, scale, shift)
        return net

    @property
    def digest(self) -> str:
        """The digest of the tensors, without the head's."""
        return digest(self.state)


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return SHA-256, first 16 hex digits, of tensors' names, types, shapes and bytes, without counts of batches."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        if name.endswith(
            "num_batches_tracked"
        ):  # some programs leave them out, and eval mode ignores them
            continue
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def is_moco(content: dict) -> bool:
    """Whether a checkpoint's content is a MoCo model's, this program's or not."""
    state = content.get("state_dict")
    return isinstance(state, dict) and any(
        str(key).startswith(("module.encoder_q.", "encoder_q.")) for key in state
    )


def read_backbone(
    path: str,
    arch: str = "",
    arch_flag: str = "--teacher-arch",
    download: bool = True,
    size: int = 0,
) -> Backbone:
    """Read a network without its head from a checkpoint, whichever program wrote it, or from a hub.

    Of several ResNets, it is the first of `find_networks`. arch: the network that it must be, and the first such is taken;
    by default what the file says, or the ResNet whose shapes fit.
    arch_flag: the option that names it, for messages; "" if the program has none.
    download: whether a hub's file that is not in the cache is downloaded.
    size: --teacher-size, in place of the side of the images that the network demands; 0: that one.
    RunError: a file that is not whole, not what its name promises, or does not fit to the last tensor.
    """
    if size and size not in SIZES:
        expected = f"expected {SIZES[0]} to {SIZES[-1]} pixels, or 0"
        raise RunError(f"{SIZE_FLAG} {size}: {expected}. Choose another")
    if path.startswith(hub.PREFIX):
        found = hub.fetch(path, download)
        weights = read_backbone(found.path, arch or found.arch, arch_flag, size=size)
        report = f"{weights.report}; {path}, SHA-256 {found.sha256}"
        return dataclasses.replace(weights, report=report)
    content = read_content(path)
    if other := other_network(path, content, arch, arch_flag):
        return read_other(path, content, other, arch_flag, size)
    networks = find_networks(path, content, arch_flag)
    if size:
        which = f"a ResNet of torchvision, which gets the student's images: {path}"
        raise RunError(f"{SIZE_FLAG} {size}: no effect on {which}. Leave it out")
    like = (
        network
        for network in networks
        if arch and nearest_arch(*describe_body(path, *network)) == arch
    )
    layout, state = next(like, networks[0])
    others = [other for other, _ in networks if other is not layout]
    body, _, stem, width = describe_body(path, layout, state)
    stated = arch or (content["arch"] if content.get("arch") in ARCHS else "")
    arch = stated or nearest_arch(body, layout, stem, width)
    if misfits := compare(body, layout, arch, stem, width):
        first = "; ".join(misfits[:3]) + (
            f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        )
        verdict = f"does not fit {arch}" if stated else f"fits no known network, {arch} best"
        raise RunError(f"{path} {verdict}: {first}: {use_another(arch_flag)}")
    if broken := [
        key
        for key, value in body.items()
        if value.is_floating_point() and not torch.isfinite(value.float()).all()
    ]:
        raise RunError(
            f"{path}: {broken[0]} has values that are not finite ({len(broken)} such tensors): use another file"
        )
    taken = {
        name: body[key]
        for name in expected_shapes(arch, stem, width)
        if (key := layout.key(name)) in body
    }
    head_state = find_head(state, layout.prefix)
    head = describe_head(head_state)
    of_width = "" if width == WIDTH else f" of width {width}"
    nested = f" in {layout.where}" if layout.where else ""
    under = f" under {layout.prefix}*" if layout.prefix else ""
    left = (
        f"; not taken: the networks under {', '.join(other.path() for other in others):.200}"
        if others
        else ""
    )
    report = (
        f"{arch}{of_width} from {path} (layout: {'numbered layers' if layout.first else 'named layers'}{nested}): "
        f"{len(taken)} tensors{under} taken, none missing; dropped: {list_dropped(state, body, layout.prefix)} "
        f"(head: {head}){left}"
    )
    meta, run = describe_run(content), facts_of_run(content)
    return Backbone(arch, stem, width, taken, report, head, meta, head_state, run)


def read_other(path: str, content: dict, arch: str, arch_flag: str, size: int) -> Backbone:
    """Return a network that is no ResNet of torchvision. size: the user's, or 0.

    RunError: the file has none, or another, or one that takes no images of that size.
    """
    meta = describe_run(content)
    needs = find_needs(path, content, arch, meta["config"], size)
    resized = size > 0
    found = find_other_body(path, content, arch, needs.size, arch_flag, resized)
    layout, state, body = found
    beside = layout.prefix.removesuffix(BODY)
    head_state = find_head(state, beside)
    head = describe_head(head_state)
    inside = {key: value for key, value in state.items() if str(key).startswith(layout.prefix)}
    under = f" under {layout.prefix}*" if layout.prefix else ""
    side = f", {needs.size} x {needs.size} pixels" if needs.size else ""
    colours = "ImageNet's" if needs[1:] == (MEAN, STD) else f"{needs.mean} and {needs.std}"
    report = (
        f"{arch} from {path}: {len(body)} tensors{under} taken, none missing; dropped: "
        f"{list_dropped(state, inside, beside)} (head: {head}); its images: mean and "
        f"deviation {colours}{side}"
    )
    taken = {BODY + name: value.contiguous() for name, value in body.items()}
    return Backbone(
        arch,
        "imagenet",
        WIDTH,
        taken,
        report,
        head,
        meta,
        head_state,
        facts_of_run(content),
        image_size=needs.size,
        mean=needs.mean,
        std=needs.std,
    )


def describe_body(
    path: str, layout: Layout, state: dict
) -> tuple[dict[str, torch.Tensor], Layout, str, int]:
    """Return a network's tensors without heads, by the file's names, its layout, its stem, and its width."""
    body = find_body(path, state, layout)
    conv = body.get(layout.key("conv1.weight"))
    stem = "small" if conv is not None and conv.shape[-1:] == (3,) else "imagenet"
    return body, layout, stem, find_width(body, layout)


def find_body(path: str, state: dict, layout: Layout) -> dict[str, torch.Tensor]:
    """Return all after the prefix except heads, by the file's names. RunError: a name is no text, or a value no tensor."""
    if odd := [key for key in state if not isinstance(key, str)]:
        raise RunError(f"{path}: {odd[0]!r} is no tensor's name: use another file")
    inside = [
        key
        for key in state
        if key.startswith(layout.prefix) and key.rpartition(".")[2] not in UNUSED
    ]
    body = {
        key: state[key]
        for key in inside
        if key.removeprefix(layout.prefix).split(".")[0] not in HEADS
    }
    if others := [key for key, value in body.items() if not torch.is_tensor(value)]:
        raise RunError(
            f"{path}: {others[0]} is no tensor but {outline(body[others[0]])}: use another file"
        )
    return body


def find_width(body: dict, layout: Layout) -> int:
    """The channels of the first stage, which the stem has too; where convolution and norm do not agree, the published 64."""
    stem = [
        body[key].shape[:1]
        for name in ("conv1.weight", "bn1.weight")
        if (key := layout.key(name)) in body
    ]
    return stem[0].numel() if len(set(stem)) == 1 and stem[0].numel() in WIDTHS else WIDTH


@functools.cache
def expected_shapes(arch: str, stem: str, width: int) -> dict[str, torch.Size]:
    """The names and shapes of a network without its head."""
    with torch.device("meta"):
        net = build_resnet(arch, stem=stem, width=width)
    return {
        key: value.shape for key, value in net.state_dict().items() if not key.startswith("fc.")
    }


def compare(body: dict, layout: Layout, arch: str, stem: str, width: int) -> list[str]:
    """What of `body` is missing, has another shape than the network's, or should not be there; in words."""
    expected = {
        layout.key(name): shape for name, shape in expected_shapes(arch, stem, width).items()
    }
    counters = "num_batches_tracked"  # absent from files of before torch 0.4.1, and without effect on the output
    missing = [
        f"{key} is missing" for key in expected if key not in body and not key.endswith(counters)
    ]
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
    parts = [f"{count} of {first}" for first, count in shown] + [
        f"{others} other{'s' * (others > 1)}"
    ] * (others > 0)
    return ", ".join(parts) or "nothing"


def find_head(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of what stands on the backbone, by its own names; {} if there is nothing.

    It is the backbone's `fc`, or the projector behind the prefix or beside the backbone.
    """
    beside = "".join(prefix.removesuffix(".").rpartition(".")[:2])
    projectors = [
        place + name for place in (prefix, beside) for name in ("projection_head.", "projector.")
    ]
    tensors = {
        key: value
        for key, value in state.items()
        if torch.is_tensor(value) and key.rpartition(".")[2] not in UNUSED
    }
    for start in (f"{prefix}fc.", *projectors):
        head = {
            key.removeprefix(start): value
            for key, value in tensors.items()
            if key.startswith(start)
        }
        if any(value.ndim == 2 for value in head.values()):
            return head
    return {}


def describe_head(head: dict[str, torch.Tensor]) -> str:
    """Return a head's widths: "linear 512-128", "mlp 512-512-128"; "none", or "other" if they do not follow one another."""
    names = [name for name, value in head.items() if value.ndim == 2]
    shapes = [
        head[name].shape
        for name in sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    ]
    if not shapes:
        return "none"
    if any(before[0] != after[1] for before, after in itertools.pairwise(shapes)):
        return "other"
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    return f"{'linear' if len(shapes) == 1 else 'mlp'} {'-'.join(map(str, widths))}"


def describe_run(content: dict) -> dict:
    """The epochs that a checkpoint counts, and its options if it is this program's."""
    epoch, config = content.get("epoch"), content.get("config")
    ours = "format" in content and isinstance(config, dict) and is_plain(config)
    return {"epoch": epoch if type(epoch) is int else None, "config": config if ours else {}}


def facts_of_run(content: dict) -> dict:
    """Return the FACTS of this program's checkpoint; {} of another program's."""
    if "format" not in content:
        return {}
    return {name: value for name, kind in FACTS.items() if type(value := content.get(name)) is kind}


def is_plain(config: dict) -> bool:
    """Whether all values are options of this program, which can travel to other workers."""
    values = itertools.chain.from_iterable(
        value if type(value) is list else [value] for value in config.values()
    )
    return all(isinstance(value, (str, int, float, type(None))) for value in [*config, *values])
