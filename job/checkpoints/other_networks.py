"""Where a checkpoint has a network that is no ResNet of torchvision, and what its images must be.

The network is known by its name: the user's, or the file's own. timm translates the names and
shapes of other programs' files for its networks.
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

BODY = "body."  # behind the prefix of an encoder of this program
SIZE_FLAG = "--teacher-size"
SIZES = range(8, 4097)  # pixels, the side of an image
DROPPED = ("fc", "head", "head_dist", "classifier", "pre_logits", "mask_token")  # no backbone's


class Found(NamedTuple):
    """A network in a file. layout: where it is. state: all tensors there, by the file's names.

    body: the network's tensors, by its own names.
    """

    layout: Layout
    state: dict[str, Any]
    body: dict[str, torch.Tensor]


class Needs(NamedTuple):
    """What a network demands of its images. size: their side; 0: any."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def other_network(path: str, content: dict, arch: str, arch_flag: str) -> str:
    """Return the name of a network that is no ResNet, by the user or the file; "" if it is one.

    arch: the user's name, or "". RunError: there is no such network, or the file names a function, which only a
    user may run.
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
    """Return the fix if a network does not fit. arch_flag: the option that names it, or ""."""
    return f"use another {arch_flag}, or another file" if arch_flag else "use another file"


def find_needs(path: str, content: dict, arch: str, options: dict, size: int = 0) -> Needs:
    """Return what the network demands of its images.

    options: of this program's run, whose images are normalised by ImageNet's mean; {} if another
    program wrote the file. size: the user's, or 0. RunError: the file has an invalid size, mean or
    deviation.
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
    """Return a value that a file has as a list, and an empty list in place of any other."""
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
    RunError: the file has no such network, or only parts of one, or it takes no such images.
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
        inside = tensors_behind(layout.prefix, state)
        found = inside
        with contextlib.suppress(Exception):  # timm expects names that other tensors do not have
            found = translate(inside, body) if translate else inside
        misfits = compare(found, expected, arch)
        if not misfits:
            taken = {name: found[name] for name in expected if name in found}
            return Found(layout, state, taken)
        first = first or misfits
    if not first:
        raise RunError(f"{path} has no tensors: found {outline(content)[:400]}: use another file")
    more = f"; and {len(first) - 3} more" if len(first) > 3 else ""
    shown = "; ".join(first[:3]) + more
    without = f"leave out {SIZE_FLAG}, " if resized and demands_size(arch) else ""
    raise RunError(f"{path} does not fit {arch}: {shown}: {without}{use_another(arch_flag)}")


def build_for_size(
    arch: str,
    size: int,
    resized: bool,
) -> tuple[nn.Module, timm_networks.Filter | None]:
    """Return a network of timm, and timm's translation of files.

    resized: the size is the user's. RunError: timm cannot build it for images of that size.
    """
    try:
        return timm_networks.build_with_filter(arch, size)
    except UNBUILT as error:
        message = refusal(arch, size, error)
        raise RunError(of_teacher(message) if resized else message) from None


def of_teacher(message: str) -> str:
    """Return a message about a network's images with the option of a teacher's."""
    return message.replace("--image-size", SIZE_FLAG)


def check_patches(arch: str, body: nn.Module, size: int) -> None:
    """RunError: a network's patches do not fill images of `size` pixels, the user's."""
    side = timm_networks.patch_side(body)
    if size % side:
        near = [each for each in (size - size % side, size + side - size % side) if each in SIZES]
        expected = f"expected a multiple of {side}, the side of the patches of {arch}"
        choice = " or ".join(map(str, near))
        raise RunError(f"{SIZE_FLAG} {size}: {expected}. Choose {choice}")


def candidates(path: str, content: dict, expected: Mapping) -> Iterator[tuple[Layout, dict]]:
    """Yield where the network may be, the likeliest first: behind any prefix, in any dictionary."""
    anchor = next(iter(expected))
    states = [(where, unwrapped(path, state)) for where, state in dictionaries(content)]
    found = []
    for where, state in states:
        names = [key for key in state if isinstance(key, str)]
        ends = [key for key in names if key == anchor or key.endswith("." + anchor)]
        found += [(Layout(where, key.removesuffix(anchor)), state) for key in ends]
    found.sort(key=lambda each: Layout(each[0].where, each[0].prefix.removesuffix(BODY)).rank())
    yield from found
    for where, state in states:  # other names altogether
        if any(torch.is_tensor(value) for value in dict.values(state)):
            yield Layout(where, ""), state


def tensors_behind(prefix: str, state: dict) -> dict[str, torch.Tensor]:
    """Return the dense tensors whose names begin with a prefix, by the rest of their names."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(prefix)
        if torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
    }


def compare(found: dict, expected: Mapping[str, torch.Tensor], arch: str) -> list[str]:
    """Return what is missing, superfluous or invalid among the tensors of a network, in words."""
    classifier = () if is_own(arch) else timm_networks.configuration(arch).classifier
    dropped = tuple(f"{name}." for name in (*DROPPED, *classifier))
    counters = "num_batches_tracked"
    missing = [f"{name} is missing" for name in expected if name not in found]
    missing = [text for text in missing if counters not in text]
    surplus = [
        name for name in found if name not in expected and not f"{name}.".startswith(dropped)
    ]
    both = {name: (found[name], expected[name]) for name in expected if name in found}
    shapes = [
        f"{name} is {tuple(value.shape)}, expected {tuple(like.shape)}"
        for name, (value, like) in both.items()
        if value.shape != like.shape
    ]
    floats = [name for name, (_, like) in both.items() if like.is_floating_point()]
    kinds = [f"{name} is {found[name].dtype}, expected floats" for name in floats
             if not found[name].is_floating_point()]  # fmt: skip
    broken = [
        f"{name} has values that are not finite" for name in floats if not is_finite(found[name])
    ]
    return shapes + missing + [f"{name} has no place" for name in surplus] + kinds + broken


def is_finite(value: torch.Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    return bool(value.float().isfinite().all())
