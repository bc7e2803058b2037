"""Where a checkpoint has a ResNet, whichever program wrote it: in which dictionary, and behind which prefix.

A ResNet is known by the names of its first block. So no list of programs is needed, nor of the prefixes that wrappers add.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from job.checkpoints.folder import has_objects
from job.checkpoints.stand_ins import Inert
from job.errors import RunError


class Layout(NamedTuple):
    """Where a file has a ResNet, and how it names it: as torchvision, after a prefix, with some parts renamed.

    where: the keys of the nested dictionaries down to the tensors, joined by dots. first: other names of first parts.
    """

    where: str
    prefix: str
    first: dict[str, str] = {}
    downsample: str = "downsample"

    def key(self, name: str) -> str:
        """Return the file's name for torchvision's `name`."""
        first, dot, rest = name.partition(".")
        return (
            self.prefix
            + self.first.get(first, first)
            + dot
            + rest.replace("downsample", self.downsample)
        )

    def path(self) -> str:
        """Return the nested keys and the prefix, as one."""
        return ".".join(filter(None, [self.where, self.prefix.removesuffix(".")]))

    def rank(self) -> tuple[int, ...]:
        """Return a key for sorting: of a file's networks the smallest is taken, and of equal ones the first."""
        keys, prefixes = (
            {name: place for place, name in enumerate(names)}
            for names in (FIRST_KEYS, FIRST_PREFIXES)
        )
        is_copy = COPY.search(self.path()) is not None
        return is_copy, keys.get(self.where, len(keys)), prefixes.get(self.prefix, len(prefixes))


# The first block of a ResNet, behind any prefix. Its stage has a number if the ResNet's children are in an nn.Sequential.
FIRST_BLOCK = re.compile(r"((?:.+\.)?)(layer1|[0-9]{1,2})\.0\.(?:conv1|conv2|bn1)\.weight")
# What torch.compile, FSDP and checkpointing put into names, anywhere.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of two networks, the one that a method's authors do not evaluate: MoCo's key encoder and BYOL's target, which are averages
# of the other; but DINO's student, because its teacher, the average, is better (arXiv 2104.14294, section 5.2).
COPY = re.compile(r"(?:^|[._])(?:k|key|m|momentum|target|ema|student)(?:[._]|$)", re.IGNORECASE)
# A student of another shape than its teacher is no copy: of a distillation, it is the network that was trained.
STUDENT = re.compile(r"(?:^|[._])student(?:[._]|$)", re.IGNORECASE)
# Of several networks that are no copies, those in these dictionaries come first, and then those after these prefixes.
FIRST_KEYS = ("state_dict", "model")
FIRST_PREFIXES = (
    "module.encoder_q.",
    "encoder_q.",
    "module.encoder.",
    "backbone.",
    "encoder.",
    "module.",
    "",
)
NESTED = 6  # dictionaries in dictionaries


def find_networks(path: str, content: dict, arch_flag: str = "") -> list[tuple[Layout, dict]]:
    """Return each ResNet with the dictionary of its tensors, the one to take first.

    arch_flag: the option that names the network, or "". RunError: the file has none.
    """
    states = {where: unwrapped(path, state) for where, state in dictionaries(content)}
    found = [
        (layout, state) for where, state in states.items() for layout in find_layouts(where, state)
    ]
    if not found:
        raise RunError(without_network(path, content, arch_flag))
    found.sort(key=lambda network: network[0].rank())
    if distilled := [
        network
        for network in found
        if STUDENT.search(network[0].path()) and shapes(*network) != shapes(*found[0])
    ]:
        found.remove(distilled[0])
        found.insert(0, distilled[0])
    return found


def shapes(layout: Layout, state: dict) -> dict[str, torch.Size]:
    """Return the shapes of a network's tensors, by its own names."""
    inside = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(layout.prefix)
    }
    return {
        key.removeprefix(layout.prefix): value.shape
        for key, value in inside.items()
        if torch.is_tensor(value)
    }


def dictionaries(content: dict, where: str = "", depth: int = NESTED) -> Iterator[tuple[str, dict]]:
    """Yield each dictionary in a file's content with the keys that lead to it."""
    yield where, content
    for key, value in dict.items(
        content
    ):  # a file may give its dictionaries attributes, such as `items`
        if depth and isinstance(key, str) and isinstance(value, dict):
            yield from dictionaries(value, f"{where}.{key}" if where else key, depth - 1)


def unwrapped(path: str, state: dict) -> dict:
    """Return a dictionary without WRAPPERS in its names. RunError: two names differ by these only."""
    names = Counter(WRAPPERS.sub("", key) for key in state if isinstance(key, str))
    if twice := [name for name, count in names.items() if count > 1]:
        raise RunError(
            f"{path}: {twice[0]} is there twice, with and without a wrapper's name; expected one. Remove the other"
        )
    return {
        WRAPPERS.sub("", key) if isinstance(key, str) else key: value
        for key, value in dict.items(state)
    }


def find_layouts(where: str, state: dict) -> list[Layout]:
    """Return the layouts of all ResNets in a dictionary of tensors, in its order, whole or not."""
    found: dict[str, Layout] = {}
    for match in filter(
        None, (FIRST_BLOCK.fullmatch(key) for key in state if isinstance(key, str))
    ):
        prefix, stage = match.groups()
        first = {}
        if stage != "layer1":
            first = {"conv1": "0", "bn1": "1"} | {
                f"layer{n}": str(int(stage) + n - 1) for n in (1, 2, 3, 4)
            }
        if prefix not in found and (not first or f"{prefix}0.weight" in state):
            shortcut = f"{prefix}{first.get('layer2', 'layer2')}.0.shortcut.0.weight" in state
            found[prefix] = Layout(where, prefix, first, "shortcut" if shortcut else "downsample")
    return list(found.values())


def without_network(path: str, content: dict, arch_flag: str) -> str:
    """Return an error message: the file has no ResNet. It lists what the file has.

    arch_flag: the option that names another network, or "".
    """
    tensors = any(
        torch.is_tensor(value) for _, state in dictionaries(content) for value in dict.values(state)
    )
    message = (
        f"{path} holds no {'ResNet' if tensors else 'network'}: expected tensors such as conv1.weight and "
        f"layer1.0.conv1.weight, after any prefix and in any dictionary; found {outline(content)[:400]}"
    )
    for key in FIRST_KEYS:
        if isinstance(value := content.get(key), Inert):
            return f"{message}. " + has_objects(
                path, type(value).__name__, f'["{key}"].state_dict()'
            )
    if arch_flag:
        return f"{message}: use another file, or name its network, as {arch_flag} timm/NAME"
    return f"{message}: use the file that the run had, or one that names its network as its arch"


def outline(value: object, depth: int = NESTED) -> str:
    """Return a value's keys, shapes and kinds, on one line."""
    if torch.is_tensor(value):
        return f"a tensor {tuple(value.shape)}"
    if not isinstance(value, dict):
        return type(value).__name__
    if not depth:
        return "{...}"
    names = {
        key: key if isinstance(key, str) else type(key).__name__
        for key in itertools.islice(value, 4)
    }
    parts = [f"{name!r:.50}: {outline(value[key], depth - 1)}" for key, name in names.items()]
    more = [f"{len(value) - 4} more"] * (len(value) > 4)
    return "{" + ", ".join(parts + more) + "}"
