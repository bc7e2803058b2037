"""A user's own network: package.module:function.

The function takes no arguments and returns an nn.Module. Its forward pass gives the pooled
features (b, C) of images (b, 3, H, W), which are normalised by ImageNet's mean and deviation.
For the distillers of maps it also has `forward_stages(images)`, which returns the pooled features
and a list of maps (b, C, H, W), one a stage from the first to the last. Four are used at most.
"""

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from job.declare import did_you_mean
from job.errors import RunError
from job.networks.encoder import Maps
from job.networks.outline import DEPTH

RULE = "expected a function without arguments that returns an nn.Module"


def build_body(arch: str) -> nn.Module:
    """Import a user's function and return its network. RunError: there is no such function."""
    module, _, name = arch.partition(":")
    if os.getcwd() not in sys.path:  # the console scripts do not add it
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        raise RunError(f"{arch}: cannot import {module}: {type(error).__name__}: {error}") from None
    if not callable(function := getattr(imported, name, None)):
        near = did_you_mean(name, dir(imported))
        raise RunError(f"{arch}: {module} has no function {name}; {RULE}{near}")
    try:
        body = function()
    except TypeError as error:
        raise RunError(f"{arch}: {error}; {RULE}") from None
    if not isinstance(body, nn.Module):
        raise RunError(f"{arch}: the function returns a {type(body).__name__}; {RULE}")
    return body


def own_pass(
    body: nn.Module,
    images: torch.Tensor,
    stages: list[int],
) -> tuple[torch.Tensor, Maps]:
    """Return pooled features (b, C), and maps of those of `stages` that the network has."""
    net: Any = body
    if not stages or not hasattr(net, "forward_stages"):
        return net(images), {}
    pooled, maps = net.forward_stages(images)
    found = dict(enumerate(maps, DEPTH + 1 - len(maps)))
    return pooled, {stage: found[stage] for stage in stages if stage in found}
