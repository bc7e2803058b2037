"""The layout of networks in memory: channels last if the network supports it."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from job.networks.encoder import Encoder, EncoderFeatures

SAFE = 16  # input channels with which `is_unsafe` layers are safe: oneDNN's block with AVX-512


def to_channels_last(net: nn.Module) -> None:
    """Store convolution weights as channels last in networks that support this layout."""
    encoders = [each for each in net.modules() if isinstance(each, Encoder | EncoderFeatures)]
    contiguous = {layer for each in encoders if not each.channels_last for layer in each.modules()}
    for layer in net.modules():
        if layer not in contiguous:
            weights_to_channels_last(layer)


def weights_to_channels_last(layer: nn.Module) -> None:
    """Store a layer's weights as channels last if it is a convolution of images.

    Others can have five dimensions, as in nn.Conv3d, which Module.to refuses.
    """
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        if all(value.dim() <= 4 for value in (*layer.parameters(), *layer.buffers())):
            layer.to(memory_format=torch.channels_last)


def make_safe(layer: nn.Module) -> None:
    """Replace the stride of a layer that is unsafe in channels last.

    It gets every n-th pixel as its input instead, and has the same output.
    """
    if is_unsafe(layer):
        assert isinstance(layer, nn.Conv2d)
        rows, columns = layer.stride
        hook = functools.partial(with_every_nth_pixel, rows, columns)
        layer.register_forward_pre_hook(hook, with_kwargs=True)
        layer.stride = (1, 1)


def is_unsafe(layer: nn.Module) -> bool:
    """Return whether the gradient of a layer can overwrite memory in channels last.

    In strided 1x1 convolutions with few input channels, oneDNN writes past a buffer on CPUs, with
    torch 2.14 too: https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.padding in ((0, 0), "valid")
        and layer.in_channels // layer.groups < SAFE
    )


def with_every_nth_pixel(
    rows: int, columns: int, layer: nn.Module, inputs: tuple, named: Mapping[str, Any]
) -> tuple[tuple, Mapping[str, Any]]:
    """Return a layer's arguments, with every n-th row and column of its images (..., H, W)."""
    if inputs:
        return (inputs[0][..., ::rows, ::columns], *inputs[1:]), named
    return inputs, {**named, "input": named["input"][..., ::rows, ::columns]}
