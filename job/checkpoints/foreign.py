"""Read a network without its head from a checkpoint of any program, and check it."""

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
    first_of,
    other_network,
    use_another,
)
from job.cluster.travels import travels
from job.data.augment import MEAN, STD
from job.errors import RunError
from job.networks import ARCHS, WIDTH, WIDTHS, Encoder, Input, Network, build_network, build_resnet

# The first parts of names, after the prefix, that are of heads.
HEADS = (
    "fc", "projection_head", "prototypes", "projector", "predictor", "classifier", "linear",
    "last_linear", "head", "heads",
)  # fmt: skip
# Facts of a run in this program's checkpoints, in addition to "epoch" and "config". step: the steps
# of the next epoch that are done. teacher: digest of its weights, or "".
FACTS = {"step": int, "workers": int, "images": int, "teacher": str}
UNUSED = ("total_ops", "total_params")  # counters that the profiler thop leaves in each module
COUNTER = "num_batches_tracked"  # of batch norm; files from before torch 0.4.1 lack it


@travels
@dataclass
class Backbone:
    """A network from a file, without its head.

    arch: its name, as of -a. state: tensors by torchvision's names, or by "body." and the names of
    another network. report: a line for the log. head: of the file's network: "linear 512-128", "mlp
    512-512-128", "none" or "other". head_state: its tensors, by names such as "weight" or
    "0.weight".

    meta: "epoch" (None if the file has none) and "config" ({} if another program wrote the file).
    run: those of FACTS that the file has. image_size: side of the images that the network needs, in
    pixels; 0: any. mean, std: of its images' colours.
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
        """Whether it is torchvision's ResNet, which has a stem and a width."""
        return self.arch in ARCHS

    @property
    def input(self) -> dict:
        """The images that the network needs, as "image_size", "mean" and "std"."""
        return {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std)}

    def build(self, image_size: int = 224) -> Network:
        """Return the network with an untrained head, for images normalised as ImageNet's.

        image_size: of the images, if the network can process any.
        RunError: the network cannot process images of this size.
        """
        size = self.image_size or image_size
        net = build_network(self.arch, stem=self.stem, width=self.width, image_size=size)
        net.load_state_dict(self.state, strict=False)  # only the head is missing
        if isinstance(net, Encoder):
            colours = list(zip(MEAN, STD, self.mean, self.std, strict=True))
            scale = tuple(ours / own for _, ours, _, own in colours)
            shift = tuple((mean - own) / std for mean, _, own, std in colours)
            net.input = Input(self.image_size, scale, shift)
        return net

    @property
    def digest(self) -> str:
        """The digest of the tensors, without the head's."""
        return digest(self.state)


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256, first 16 hex digits, of tensors' names, types, shapes and bytes.

    Counts of batches are left out, as some programs do, because eval mode ignores them.
    """
    sha256 = hashlib.sha256()
    for name, value in sorted(state.items()):
        if name.endswith(COUNTER):
            continue
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha256.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]


def is_moco(content: dict) -> bool:
    """Return whether a checkpoint has a MoCo model, of any program."""
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
    """Read a network without its head from a hub, or from a checkpoint of any program.

    The network is the first of `find_networks`, or the first that is an `arch`.
    arch: the network's name; "" for the file's, or the ResNet whose shapes fit.
    arch_flag: the option that sets `arch`, for messages; "" if the program has none.
    download: whether a hub's file that is not in the cache is downloaded.
    size: --teacher-size, the side of the images; 0: the side that the network needs.
    RunError: the file is incomplete, not the released file that its name promises, or not all of
    its tensors fit the network.
    """
    if size and size not in SIZES:
        expected = f"expected {SIZES[0]} to {SIZES[-1]} pixels, or 0"
        raise RunError(f"{SIZE_FLAG} {size}: {expected}. Choose another")
    if path.startswith(hub.PREFIX):
        weights = hub.fetch(path, download)
        backbone = read_backbone(weights.path, arch or weights.arch, arch_flag, size=size)
        report = f"{backbone.report}; {path}, SHA-256 {weights.sha256}"
        return dataclasses.replace(backbone, report=report)
    content = read_content(path)
    if other := other_network(path, content, arch, arch_flag):
        return read_other(path, content, other, arch_flag, size)
    networks = find_networks(path, content, arch_flag)
    if size:
        network = f"torchvision's ResNet, which gets the student's images: {path}"
        raise RunError(f"{SIZE_FLAG} {size}: no effect on {network}. Leave it out")
    return read_resnet(path, content, networks, arch, arch_flag)


def read_resnet(
    path: str, content: dict, networks: list[tuple[Layout, dict]], arch: str, arch_flag: str
) -> Backbone:
    """Return the first of a file's `networks`, or the first that is an `arch`.

    RunError: not all of its tensors fit a ResNet of torchvision, or are finite.
    """
    like = (
        network
        for network in networks
        if arch and nearest_arch(*describe_body(path, *network)) == arch
    )
    layout, state = next(like, networks[0])
    body, _, stem, width = describe_body(path, layout, state)
    stated = arch or (content["arch"] if content.get("arch") in ARCHS else "")
    arch = stated or nearest_arch(body, layout, stem, width)
    if misfits := compare(body, layout, arch, stem, width):
        verdict = f"does not fit {arch}" if stated else f"fits no ResNet ({arch} is the nearest)"
        raise RunError(f"{path} {verdict}: {first_of(misfits)}: {use_another(arch_flag)}")
    check_is_finite(path, body)
    loaded = {
        name: body[key]
        for name in expected_shapes(arch, stem, width)
        if (key := layout.key(name)) in body
    }
    head_state = find_head(state, layout.prefix)
    head = describe_head(head_state)
    of_width = "" if width == WIDTH else f" of width {width}"
    nested = f" in {layout.where}" if layout.where else ""
    under = f" under {layout.prefix}*" if layout.prefix else ""
    layers = "numbered layers" if layout.first else "named layers"
    others = [other.path() for other, _ in networks if other is not layout]
    report = (
        f"{arch}{of_width} from {path} (layout: {layers}{nested}): {len(loaded)} tensors{under} "
        f"loaded, none missing; not needed, so ignored: "
        f"{list_ignored(state, body, layout.prefix)} (head: {head})"
        + (f"; other networks in the file: {', '.join(others):.200}" if others else "")
    )
    meta, run = describe_run(content), facts_of_run(content)
    return Backbone(arch, stem, width, loaded, report, head, meta, head_state, run)


def check_is_finite(path: str, body: dict[str, torch.Tensor]) -> None:
    """RunError: a floating-point tensor of `body` has values that are not finite."""
    broken = [
        key
        for key, value in body.items()
        if value.is_floating_point() and not torch.isfinite(value.float()).all()
    ]
    if broken:
        raise RunError(
            f"{path}: {broken[0]} has values that are not finite ({len(broken)} such tensors): use "
            "another file"
        )


def read_other(path: str, content: dict, arch: str, arch_flag: str, size: int) -> Backbone:
    """Return a network that is not torchvision's ResNet. size: the user's, or 0.

    RunError: the file does not have this network, or it cannot process images of this size.
    """
    meta = describe_run(content)
    needs = find_needs(path, content, arch, meta["config"], size)
    resized = size > 0
    layout, state, body = find_other_body(path, content, arch, needs.size, arch_flag, resized)
    prefix = layout.prefix.removesuffix(BODY)
    head_state = find_head(state, prefix)
    head = describe_head(head_state)
    inside = {key: value for key, value in state.items() if str(key).startswith(layout.prefix)}
    under = f" under {layout.prefix}*" if layout.prefix else ""
    side = f", {needs.size} x {needs.size} pixels" if needs.size else ""
    colours = "ImageNet's" if needs[1:] == (MEAN, STD) else f"{needs.mean} and {needs.std}"
    report = (
        f"{arch} from {path}: {len(body)} tensors{under} loaded, none missing; not needed, so "
        f"ignored: {list_ignored(state, inside, prefix)} (head: {head}); its images: mean and "
        f"deviation {colours}{side}"
    )
    loaded = {BODY + name: value.contiguous() for name, value in body.items()}
    return Backbone(
        arch,
        "imagenet",
        WIDTH,
        loaded,
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
    """Return a network's tensors without heads, by the file's names, its layout, stem and width."""
    body = find_body(path, state, layout)
    conv = body.get(layout.key("conv1.weight"))
    stem = "small" if conv is not None and conv.shape[-1:] == (3,) else "imagenet"
    return body, layout, stem, find_width(body, layout)


def find_body(path: str, state: dict, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors after the prefix, except heads', by the file's names.

    RunError: a name is not text, or a value is not a tensor.
    """
    if odd := [key for key in state if not isinstance(key, str)]:
        raise RunError(f"{path}: {odd[0]!r} as a tensor's name; expected text. Use another file")
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
            f"{path}: {others[0]} is {outline(body[others[0]])}; expected a tensor. Use another "
            "file"
        )
    return body


def find_width(body: dict, layout: Layout) -> int:
    """Return the channels of the stem and the first stage; 64 if convolution and norm differ."""
    stem = [
        body[key].shape[:1]
        for name in ("conv1.weight", "bn1.weight")
        if (key := layout.key(name)) in body
    ]
    return stem[0].numel() if len(set(stem)) == 1 and stem[0].numel() in WIDTHS else WIDTH


@functools.cache
def expected_shapes(arch: str, stem: str, width: int) -> dict[str, torch.Size]:
    """Return the shapes of a network's tensors without its head, by name."""
    with torch.device("meta"):
        net = build_resnet(arch, stem=stem, width=width)
    return {
        key: value.shape for key, value in net.state_dict().items() if not key.startswith("fc.")
    }


def compare(body: dict, layout: Layout, arch: str, stem: str, width: int) -> list[str]:
    """Return a text about each missing, unexpected or invalid tensor of `body`."""
    expected = {
        layout.key(name): shape for name, shape in expected_shapes(arch, stem, width).items()
    }
    missing = [
        f"{key} is missing" for key in expected if key not in body and not key.endswith(COUNTER)
    ]
    surplus = [f"{key} is unexpected" for key in body if key not in expected]
    misshapen = [
        f"{key} is {tuple(value.shape)}, expected {tuple(expected[key])}"
        for key, value in body.items()
        if key in expected and value.shape != expected[key]
    ]
    integers = [
        f"{key} is {value.dtype}, expected floats"
        for key, value in body.items()
        if key in expected and not value.is_floating_point() and not key.endswith(COUNTER)
    ]
    sparse = [
        f"{key} is {'without values' if value.is_meta else value.layout}, expected a dense tensor"
        for key, value in body.items()
        if value.is_meta or value.layout != torch.strided
    ]
    return misshapen + missing + surplus + integers + sparse


def nearest_arch(body: dict, layout: Layout, stem: str, width: int) -> str:
    """Return the network whose names and shapes differ least from those of `body`."""
    misfits = {}
    for arch in ARCHS:
        misfits[arch] = len(compare(body, layout, arch, stem, width))
        if not misfits[arch]:
            break
    return min(misfits, key=lambda arch: misfits[arch])


def list_ignored(state: dict, body: dict, prefix: str) -> str:
    """Return the numbers of ignored tensors: "124 of encoder_k, 4 of fc, 2 others".

    They are counted by the first parts of their names.
    """
    short = [key.removeprefix(prefix).removeprefix("module.") for key in state if key not in body]
    shown = Counter(name.split(".")[0] for name in short if "." in name).most_common(6)
    others = len(short) - sum(count for _, count in shown)
    parts = [f"{count} of {first}" for first, count in shown] + [
        f"{others} other{'s' * (others > 1)}"
    ] * (others > 0)
    return ", ".join(parts) or "nothing"


def find_head(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the head, by its own names; {} if there is no head.

    The head is the network's `fc`, or a projector after the prefix or next to the network.
    """
    parent = "".join(prefix.removesuffix(".").rpartition(".")[:2])
    projectors = [
        start + name for start in (prefix, parent) for name in ("projection_head.", "projector.")
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
    """Return a head's widths: "linear 512-128", "mlp 512-512-128" or "none".

    If the layers do not follow one another, return "other".
    """
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
    """Return a checkpoint's "epoch", or None, and its "config", {} of another program."""
    epoch, config = content.get("epoch"), content.get("config")
    own = "format" in content and isinstance(config, dict) and is_plain(config)
    return {"epoch": epoch if type(epoch) is int else None, "config": config if own else {}}


def facts_of_run(content: dict) -> dict:
    """Return the FACTS of this program's checkpoint; {} of another program's."""
    if "format" not in content:
        return {}
    return {name: value for name, kind in FACTS.items() if type(value := content.get(name)) is kind}


def is_plain(config: dict) -> bool:
    """Return whether all values can be options, so that they can be sent to other workers."""
    values = itertools.chain.from_iterable(
        value if type(value) is list else [value] for value in config.values()
    )
    return all(isinstance(value, (str, int, float, type(None))) for value in [*config, *values])
