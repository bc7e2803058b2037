"""A user's own network: package.module:function.

The function has no arguments and returns an nn.Module. Its forward pass gives the pooled
features (b, C) of images (b, 3, H, W), which are normalised by ImageNet's mean and deviation.
For the distillers of maps it also has `forward_stages(images)`, which returns the pooled features
and a list of maps (b, C, H, W), one a stage from the first to the last. Four are used at most.
Layers of dropout and stochastic depth are switched off. Frozen parameters stay frozen.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from job.declare import did_you_mean
from job.errors import RunError
from job.files import find_own_modules
from job.networks.dropout import switch_off_dropout
from job.networks.encoder import Maps
from job.networks.outline import DEPTH

RULE = "expected a function without arguments that returns an nn.Module"


def build_body(arch: str) -> nn.Module:
    """Import a user's function and return its network, without dropout.

    RunError: the function is missing or fails.
    """
    module, _, name = arch.partition(":")
    find_own_modules()
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        raise RunError(f"{arch}: cannot import {module}: {type(error).__name__}: {error}") from None
    if not callable(function := getattr(imported, name, None)):
        near = did_you_mean(name, dir(imported))
        raise RunError(f"{arch}: {module} has no function {name}; {RULE}{near}")
    check_arguments(arch, function)
    try:
        body = function()
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise RunError(f"{arch}: the function {name} fails: {cause}. Fix the function") from error
    if not isinstance(body, nn.Module):
        raise RunError(f"{arch}: the function returns a {type(body).__name__}; {RULE}")
    return switch_off_dropout(body)


def check_arguments(arch: str, function: Callable) -> None:
    """RunError: a function has arguments without defaults."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions in C have no signature
        return
    try:
        signature.bind()
    except TypeError as error:
        raise RunError(f"{arch}: {error}; {RULE}") from None


def own_pass(
    body: nn.Module,
    images: torch.Tensor,
    stages: list[int],
) -> tuple[torch.Tensor, Maps]:
    """Return pooled features (b, C), and the maps of `stages` that the network has."""
    net: Any = body
    if not stages or not hasattr(net, "forward_stages"):
        return net(images), {}
    pooled, maps = net.forward_stages(images)
    of_stage = dict(enumerate(maps, DEPTH + 1 - len(maps)))
    return pooled, {stage: of_stage[stage] for stage in stages if stage in of_stage}
