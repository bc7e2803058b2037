"""Networks of timm (pip install '.[timm]'), with random weights, without their classifiers."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from job.declare import did_you_mean
from job.errors import RunError
from job.networks.dropout import switch_off_dropout
from job.networks.encoder import Maps
from job.networks.outline import DEPTH

PREFIX = "timm/"
Filter = Callable[[dict, nn.Module], dict]


def import_timm(shown: str) -> Any:
    """Return the package. RunError: it is not installed. shown: the option and its value."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise RunError(f"{shown} needs {error.name}: pip install '.[timm]'") from None


def names() -> list[str]:
    """Return the names of all networks, with the prefix, or [] without the package."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return []
    return [PREFIX + name for name in timm.list_models()]


def check_name(arch: str, shown: str) -> None:
    """RunError: the network or its set of weights does not exist. shown: the option."""
    timm = import_timm(f"{shown} {arch}")
    name = arch.removeprefix(PREFIX)
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = did_you_mean(arch.partition(".")[0], names())
        raise RunError(f"{shown} {arch!r}: no network of timm {timm.__version__}{near}")
    if tag and name not in timm.list_pretrained(f"{base}.*"):
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
        near = did_you_mean(tag, tags) or f"; expected one of {', '.join(tags)}"
        raise RunError(
            f"{shown} {arch!r}: no weights {tag} of {base} in timm {timm.__version__}{near}"
        )


class Configuration(NamedTuple):
    """The input for which timm's weights of a network were trained.

    size: side of the images, if the network requires one, else 0. classifier: names of its layers.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classifier: tuple[str, ...]


@functools.cache
def configuration(arch: str) -> Configuration:
    """Return the configuration of a network by timm."""
    timm = import_timm(arch)
    pretrained = timm.models.get_pretrained_cfg(arch.removeprefix(PREFIX))
    classifier = pretrained.classifier or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    size = pretrained.input_size[-1] if pretrained.fixed_input_size else 0
    return Configuration(size, tuple(pretrained.mean), tuple(pretrained.std), classifier)


def build_body(arch: str, image_size: int) -> nn.Module:
    """Return a network, (b, 3, H, W) -> (b, C), for images of `image_size` pixels.

    Dropout and stochastic depth are switched off, so that a resumed run computes the same bytes.
    """
    return switch_off_dropout(create(arch, image_size))


def create(arch: str, image_size: int, **options: Any) -> Any:
    """Return a new network of timm without a classifier."""
    if configuration(arch).size:
        options["img_size"] = image_size
    name = arch.removeprefix(PREFIX)
    return import_timm(arch).create_model(name, num_classes=0, **options)


def patch_side(body: nn.Module) -> int:
    """Return the side of a network's patches in pixels, or 1 without patches."""
    side = getattr(getattr(body, "patch_embed", None), "patch_size", 1)
    return max(side) if isinstance(side, tuple) else int(side)


@dataclass(frozen=True)
class TimmPass:
    """A pass through a network of timm. indices: of the stages' maps, as timm counts them."""

    indices: dict[int, int]

    def __call__(
        self,
        body: nn.Module,
        images: torch.Tensor,
        stages: list[int],
    ) -> tuple[torch.Tensor, Maps]:
        """Return pooled features (b, C), and the maps of `stages` that the network has."""
        stages = [stage for stage in stages if stage in self.indices]
        net: Any = body
        if not stages:
            return net(images), {}
        indices = [self.indices[stage] for stage in stages]
        last, maps = net.forward_intermediates(images, indices=indices)
        return net.forward_head(last), dict(zip(stages, maps, strict=True))


def find_pass(body: nn.Module) -> TimmPass:
    """Return the pass of a network, which gives the maps of its stages.

    The last map of each stride is a stage, and the last four of them are used. If all maps have
    the same stride, as in a ViT, the stages are four maps at equal distances.
    """
    if not hasattr(body, "forward_intermediates"):
        return TimmPass({})
    strides = [each["reduction"] for each in body.feature_info]  # type: ignore[union-attr]
    last = {stride: index for index, stride in enumerate(strides)}
    indices = [last[stride] for stride in sorted(last)][-DEPTH:]
    if len(last) == 1:
        count = min(DEPTH, len(strides))
        indices = [len(strides) * number // count - 1 for number in range(1, count + 1)]
    first = DEPTH + 1 - len(indices)
    return TimmPass(dict(enumerate(indices, first)))


def build_with_filter(arch: str, image_size: int) -> tuple[nn.Module, Filter | None]:
    """Return a network, and timm's function that translates other names and shapes of tensors.

    timm passes the function to its own loader, which is replaced here.
    """
    received: dict[str, Any] = {}

    def load(model: nn.Module, **options: Any) -> None:
        received.update(options)

    import_timm(arch)
    with mock.patch("timm.models._builder.load_pretrained", load):
        body = create(arch, image_size, pretrained=True)
    return body, received.get("filter_fn")
