"""Find a network that is not torchvision's ResNet in a checkpoint, and the images that it needs.

The user or the file names the network. timm translates the names and shapes of other programs'
files for its networks.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from job.checkpoints.layouts import Layout, dictionaries, outline, unwrapped
from job.data.augment import MEAN, STD
from job.errors import RunError
from job.networks import ARCHS, check_name, demands_size, is_own, own, timm_networks
from job.networks.probe import UNBUILT, refusal

BODY = "body."  # after the prefix of this program's encoder
SIZE_FLAG = "--teacher-size"
SIZES = range(8, 4097)  # pixels, the side of an image
DROPPED = ("fc", "head", "head_dist", "classifier", "pre_logits", "mask_token")  # not of a body


class Found(NamedTuple):
    """A network in a file. layout: where it is. state: all tensors there, by the file's names.

    body: the network's tensors, by its own names.
    """

    layout: Layout
    state: dict[str, Any]
    body: dict[str, torch.Tensor]


class Needs(NamedTuple):
    """The images that a network needs. size: side in pixels; 0: any. mean, std: of colours."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def other_network(path: str, content: dict, arch: str, arch_flag: str) -> str:
    """Return the name of a network that is not torchvision's ResNet; "" if it is.

    arch: the user's name, or "" for the file's.
    RunError: there is no such network, or the file names a function, which only a user may run.
    """
    if arch:
        check_name(arch, arch_flag)
        return "" if arch in ARCHS else arch
    stated = content.get("arch")
    if not isinstance(stated, str):
        return ""
    if stated.startswith(timm_networks.PREFIX):
        check_name(stated, f"{path}: arch")
        return stated
    if is_own(stated):
        problem = f"{path} has a network of the function {stated}, and a file never runs code"
        if not arch_flag:
            raise RunError(f"{problem}; this program has no option that allows it")
        raise RunError(f"{problem}: if you trust the function, give {arch_flag} {stated}")
    return ""


def use_another(arch_flag: str) -> str:
    """Return the advice if a network does not fit. arch_flag: the option that names it, or ""."""
    return f"use another {arch_flag}, or another file" if arch_flag else "use another file"


def first_of(misfits: list[str]) -> str:
    """Return the first three texts about tensors, and the number of the others."""
    more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    return "; ".join(misfits[:3]) + more


def find_needs(path: str, content: dict, arch: str, options: dict, size: int = 0) -> Needs:
    """Return the size and colours of the images that a network needs.

    options: of this program's run, whose images are normalised by ImageNet's mean and deviation; {}
    if another program wrote the file. size: the user's, or 0.
    RunError: the file has an invalid size, mean or deviation.
    """
    own_network = is_own(arch)
    needs = Needs(0, MEAN, STD) if own_network else Needs(*timm_networks.configuration(arch)[:3])
    stated = content.get("input")
    if isinstance(stated, dict):
        needs = Needs(
            stated.get("image_size", needs.size),
            tuple(as_list(stated.get("mean", needs.mean))),
            tuple(as_list(stated.get("std", needs.std))),
        )
    elif options:
        needs = Needs(options.get("image_size", 0) if needs.size else 0, MEAN, STD)
    numbers = [*needs.mean, *needs.std]
    valid = len(needs.mean) == len(needs.std) == 3 and all(type(each) is float for each in numbers)
    valid = valid and all(map(math.isfinite, numbers)) and min(needs.std) > 0
    if not valid or type(needs.size) is not int or (needs.size and needs.size not in SIZES):
        expected = "expected a size, a finite mean and a finite deviation above 0"
        raise RunError(f"{path}: invalid input {tuple(needs)}; {expected}")
    return needs._replace(size=size or needs.size)


def as_list(value: Any) -> list | tuple:
    """Return a list or tuple of a file, and [] for any other value."""
    return value if isinstance(value, (list, tuple)) else []


def find_other_body(
    path: str,
    content: dict,
    arch: str,
    size: int,
    arch_flag: str,
    resized: bool = False,
) -> Found:
    """Return a network's tensors, built for images of `size` pixels.

    timm resamples position embeddings of another size. resized: the size is the user's.
    RunError: the file has no such network, it is incomplete, or it cannot process such images.
    """
    with torch.random.fork_rng(devices=[]):
        if is_own(arch):
            body, translate = own.build_body(arch), None
        else:
            body, translate = build_for_size(arch, size, resized)
    if resized:
        check_patches(arch, body, size)
    expected = body.state_dict()
    first: list[str] = []
    for layout, state in candidates(path, content, expected):
        inside = tensors_after(layout.prefix, state)
        tensors = inside
        with contextlib.suppress(Exception):  # timm expects names that other networks lack
            tensors = translate(inside, body) if translate else inside
        misfits = compare(tensors, expected, arch)
        if not misfits:
            loaded = {name: tensors[name] for name in expected if name in tensors}
            return Found(layout, state, loaded)
        first = first or misfits
    if not first:
        raise RunError(f"{path} has no tensors: found {outline(content)[:400]}: use another file")
    without = f"leave out {SIZE_FLAG}, " if resized and demands_size(arch) else ""
    fix = f"{without}{use_another(arch_flag)}"
    raise RunError(f"{path} does not fit {arch}: {first_of(first)}: {fix}")


def build_for_size(
    arch: str,
    size: int,
    resized: bool,
) -> tuple[nn.Module, timm_networks.Filter | None]:
    """Return a network of timm, and timm's translation of files for it.

    resized: the size is the user's. RunError: timm cannot build it for images of that size.
    """
    try:
        return timm_networks.build_with_filter(arch, size)
    except UNBUILT as error:
        message = refusal(arch, size, error)
        raise RunError(of_teacher(message) if resized else message) from None


def of_teacher(message: str) -> str:
    """Return a message about --image-size as one about a teacher's option."""
    return message.replace("--image-size", SIZE_FLAG)


def check_patches(arch: str, body: nn.Module, size: int) -> None:
    """RunError: `size`, the user's, is not a multiple of the side of the network's patches."""
    side = timm_networks.patch_side(body)
    if size % side:
        near = [each for each in (size - size % side, size + side - size % side) if each in SIZES]
        expected = f"expected a multiple of {side}, the side of the patches of {arch}"
        choice = " or ".join(map(str, near))
        raise RunError(f"{SIZE_FLAG} {size}: {expected}. Choose {choice}")


def candidates(path: str, content: dict, expected: Mapping) -> Iterator[tuple[Layout, dict]]:
    """Yield places of the network, the likeliest first: after any prefix, in any dictionary."""
    anchor = next(iter(expected))
    states = [(where, unwrapped(path, state)) for where, state in dictionaries(content)]
    named = []
    for where, state in states:
        names = [key for key in state if isinstance(key, str)]
        ends = [key for key in names if key == anchor or key.endswith("." + anchor)]
        named += [(Layout(where, key.removesuffix(anchor)), state) for key in ends]
    named.sort(key=lambda each: Layout(each[0].where, each[0].prefix.removesuffix(BODY)).rank())
    yield from named
    for where, state in states:  # all names may differ
        if any(torch.is_tensor(value) for value in dict.values(state)):
            yield Layout(where, ""), state


def tensors_after(prefix: str, state: dict) -> dict[str, torch.Tensor]:
    """Return the dense tensors after a prefix, by the rest of their names."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(prefix)
        if torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
    }


def compare(tensors: dict, expected: Mapping[str, torch.Tensor], arch: str) -> list[str]:
    """Return a text about each missing, unexpected or invalid tensor of a network."""
    classifier = () if is_own(arch) else timm_networks.configuration(arch).classifier
    dropped = tuple(f"{name}." for name in (*DROPPED, *classifier))
    counters = "num_batches_tracked"
    missing = [f"{name} is missing" for name in expected if name not in tensors]
    missing = [text for text in missing if counters not in text]
    surplus = [
        name for name in tensors if name not in expected and not f"{name}.".startswith(dropped)
    ]
    both = {name: (tensors[name], expected[name]) for name in expected if name in tensors}
    shapes = [
        f"{name} is {tuple(value.shape)}, expected {tuple(like.shape)}"
        for name, (value, like) in both.items()
        if value.shape != like.shape
    ]
    floats = [name for name, (_, like) in both.items() if like.is_floating_point()]
    dtypes = [
        f"{name} is {tensors[name].dtype}, expected floats"
        for name in floats
        if not tensors[name].is_floating_point()
    ]
    broken = [
        f"{name} has values that are not finite" for name in floats if not is_finite(tensors[name])
    ]
    return shapes + missing + [f"{name} is unexpected" for name in surplus] + dtypes + broken


def is_finite(value: torch.Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    return bool(value.float().isfinite().all())
