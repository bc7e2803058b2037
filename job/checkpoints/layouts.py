"""Find ResNets in a checkpoint of any program: in which dictionary, and after which prefix.

The names of its first block identify a ResNet. So no list of programs or of wrappers' prefixes is
needed.
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
    """Where a file has a ResNet, and how its names differ from torchvision's.

    where: the keys of the nested dictionaries down to the tensors, joined by dots. prefix: of all
    names. first: the file's names of children, by torchvision's. downsample: the file's name of it.
    """

    where: str
    prefix: str
    first: dict[str, str] = {}
    downsample: str = "downsample"

    def key(self, name: str) -> str:
        """Return the file's name of the tensor that torchvision names `name`."""
        first, dot, rest = name.partition(".")
        return (
            self.prefix
            + self.first.get(first, first)
            + dot
            + rest.replace("downsample", self.downsample)
        )

    def path(self) -> str:
        """Return the nested keys and the prefix, joined by dots."""
        return ".".join(filter(None, [self.where, self.prefix.removesuffix(".")]))

    def rank(self) -> tuple[int, ...]:
        """Return a sort key. The first network of a file, sorted stably by it, is loaded."""
        keys, prefixes = (
            {name: index for index, name in enumerate(names)}
            for names in (FIRST_KEYS, FIRST_PREFIXES)
        )
        is_copy = COPY.search(self.path()) is not None
        return is_copy, keys.get(self.where, len(keys)), prefixes.get(self.prefix, len(prefixes))


# The first block of a ResNet, after any prefix. If the ResNet's children are in an nn.Sequential,
# its stage has a number.
FIRST_BLOCK = re.compile(r"((?:.+\.)?)(layer1|[0-9]{1,2})\.0\.(?:conv1|conv2|bn1)\.weight")
# Parts of names that torch.compile, FSDP and checkpointing insert anywhere.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The network of two that a method's authors do not evaluate. MoCo's key encoder and BYOL's target
# are averages of the other network. In DINO it is the student, because its teacher, the average, is
# better (arXiv 2104.14294, section 5.2).
COPY = re.compile(r"(?:^|[._])(?:k|key|m|momentum|target|ema|student)(?:[._]|$)", re.IGNORECASE)
# A student whose shape differs from its teacher's is no copy: a distillation has trained it.
STUDENT = re.compile(r"(?:^|[._])student(?:[._]|$)", re.IGNORECASE)
# Networks that are no copies are sorted by these dictionaries, then by these prefixes.
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
NESTED = 6  # levels of dictionaries in dictionaries


def find_networks(path: str, content: dict, arch_flag: str = "") -> list[tuple[Layout, dict]]:
    """Return the ResNets, each with the dictionary of its tensors, the one to load first.

    arch_flag: the option that names the network, or "". RunError: the file has no ResNet.
    """
    states = {where: unwrapped(path, state) for where, state in dictionaries(content)}
    networks = [
        (layout, state) for where, state in states.items() for layout in find_layouts(where, state)
    ]
    if not networks:
        raise RunError(without_network(path, content, arch_flag))
    networks.sort(key=lambda network: network[0].rank())
    if distilled := [
        network
        for network in networks
        if STUDENT.search(network[0].path()) and shapes(*network) != shapes(*networks[0])
    ]:
        networks.remove(distilled[0])
        networks.insert(0, distilled[0])
    return networks


def shapes(layout: Layout, state: dict) -> dict[str, torch.Size]:
    """Return the shapes of a network's tensors, by their names after the prefix."""
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
    for key, value in dict.items(content):  # a file can set attributes, such as `items`
        if depth and isinstance(key, str) and isinstance(value, dict):
            yield from dictionaries(value, f"{where}.{key}" if where else key, depth - 1)


def unwrapped(path: str, state: dict) -> dict:
    """Return a dictionary without WRAPPERS in its names. RunError: two names become the same."""
    names = Counter(WRAPPERS.sub("", key) for key in state if isinstance(key, str))
    if twice := [name for name, count in names.items() if count > 1]:
        raise RunError(
            f"{path}: {twice[0]} occurs twice, with and without a wrapper's name; expected one. "
            "Remove the other"
        )
    return {
        WRAPPERS.sub("", key) if isinstance(key, str) else key: value
        for key, value in dict.items(state)
    }


def find_layouts(where: str, state: dict) -> list[Layout]:
    """Return the layouts of all ResNets in a dictionary, in its order, complete or not."""
    layouts: dict[str, Layout] = {}
    for match in filter(
        None, (FIRST_BLOCK.fullmatch(key) for key in state if isinstance(key, str))
    ):
        prefix, stage = match.groups()
        first = {}
        if stage != "layer1":
            first = {"conv1": "0", "bn1": "1"} | {
                f"layer{n}": str(int(stage) + n - 1) for n in (1, 2, 3, 4)
            }
        if prefix not in layouts and (not first or f"{prefix}0.weight" in state):
            shortcut = f"{prefix}{first.get('layer2', 'layer2')}.0.shortcut.0.weight" in state
            downsample = "shortcut" if shortcut else "downsample"
            layouts[prefix] = Layout(where, prefix, first, downsample)
    return list(layouts.values())


def without_network(path: str, content: dict, arch_flag: str) -> str:
    """Return an error message: the file has no ResNet. It shows the file's keys.

    arch_flag: the option that names another network, or "".
    """
    tensors = any(
        torch.is_tensor(value) for _, state in dictionaries(content) for value in dict.values(state)
    )
    message = (
        f"{path} holds no {'ResNet' if tensors else 'network'}: expected tensors such as "
        "conv1.weight and layer1.0.conv1.weight, after any prefix and in any dictionary; found "
        f"{outline(content)[:400]}"
    )
    for key in FIRST_KEYS:
        if isinstance(value := content.get(key), Inert):
            return f"{message}. " + has_objects(
                path, type(value).__name__, f'["{key}"].state_dict()'
            )
    if arch_flag:
        return f"{message}: use another file, or name its network, as {arch_flag} timm/NAME"
    return f"{message}: use the file that the run used, or one whose arch names its network"


def outline(value: object, depth: int = NESTED) -> str:
    """Return a value's keys, shapes and types, on one line."""
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
