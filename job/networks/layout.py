"""The layout of weights and maps in memory: channels last where a network allows it."""

import torch
from torch import nn

from job.networks.encoder import Encoder, EncoderFeatures

FEWEST = 16  # input channels of a strided convolution of single pixels, see `overruns`


def to_channels_last(net: nn.Module) -> None:
    """Store the weights of convolutions as channels last, of all networks that can run in it."""
    encoders = [each for each in net.modules() if isinstance(each, Encoder | EncoderFeatures)]
    contiguous = {layer for each in encoders if not each.channels_last for layer in each.modules()}
    for layer in net.modules():
        if layer not in contiguous:
            weights_to_channels_last(layer)


def weights_to_channels_last(layer: nn.Module) -> None:
    """Store a layer's weights as channels last if it is a convolution of images.

    Others can have five dimensions, as in nn.Conv3d, which Module.to refuses.
    """
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not overruns(layer):
        if all(value.dim() <= 4 for value in (*layer.parameters(), *layer.buffers())):
            layer.to(memory_format=torch.channels_last)


def guard(layer: nn.Module) -> None:
    """Let a layer convert its input if another layout is not safe."""
    if overruns(layer):
        layer.register_forward_pre_hook(contiguous_on_cpu)


def contiguous_on_cpu(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple:
    """Return a layer's inputs, contiguous if they are on the CPU."""
    return tuple(each if each.is_cuda else each.contiguous() for each in inputs)


def overruns(layer: nn.Module) -> bool:
    """Return whether a layer's gradient can overwrite memory if weights or input are channels last.

    oneDNN then writes past a buffer on CPUs, with torch 2.14 too:
    https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.in_channels // layer.groups < FEWEST
    )
