"""Any network by its name, and its features."""

from torch import nn
from torchvision.models import ResNet

from job.networks import resnet
from job.networks.encoder import Encoder, EncoderFeatures
from job.networks.heads import build_mlp
from job.networks.names import check_name
from job.networks.outline import HEAD, Outline
from job.networks.probe import build_body, probe
from job.networks.resnet import ARCHS, WIDTH, build_resnet, resnet_features, resnet_outline

Network = ResNet | Encoder


def build_network(
    arch: str,
    dim: int = 128,
    mlp: bool = False,
    stem: str = "imagenet",
    width: int = WIDTH,
    zero_init_residual: bool = False,
    head_width: int = 0,
    image_size: int = 224,
) -> Network:
    """Return a network with random weights, whose `fc` gives `dim` outputs.

    The arguments are as for `build_resnet`, and image_size, for networks that require a fixed one.
    Only ResNets have stem, width and zero_init_residual.
    RunError: the network cannot process such images.
    """
    if arch in ARCHS:
        return build_resnet(arch, dim, mlp, stem, width, zero_init_residual, head_width)
    check_name(arch, "network")
    body, probed = build_body(arch, image_size), probe(arch, image_size)
    for name, value in body.named_parameters():
        if name in probed.unused:
            value.requires_grad_(False)
    features = probed.outline.pooled
    fc = build_mlp(features, head_width or features, dim) if mlp else nn.Linear(features, dim)
    return Encoder(body, probed.run, fc, probed.norms, probed.channels_last)


def network_outline(arch: str, stem: str, width: int, image_size: int) -> Outline:
    """Return the features of a network for images of `image_size` pixels."""
    if arch in ARCHS:
        return resnet_outline(arch, stem, width, image_size)
    return probe(arch, image_size).outline


def with_features(net: nn.Module, stages: list[int], output: str | None = HEAD) -> nn.Module:
    """Return `net` as a module with a dict of tensors as output, the same parameters and names.

    "layer1".."layer4" for `stages`, (b, C, H, W). In addition the node `output`: "fc" (b, dim), or
    "flatten" (b, C), the features under the head. If `output` is None, the head is not computed.
    The maps of ResNets are the sums before the stages' last ReLU. For others see `EncoderFeatures`.
    """
    if isinstance(net, Encoder):
        return EncoderFeatures(net, stages, output)
    assert isinstance(net, ResNet)
    return resnet_features(net, stages, output)


def stage_norms(net: Network) -> dict[int, nn.BatchNorm2d]:
    """Return the last batch norm of each stage that ends in one, {stage: norm}."""
    if isinstance(net, ResNet):
        return resnet.stage_norms(net)
    named = {stage: net.body.get_submodule(name) for stage, name in net.norms.items()}
    return {stage: norm for stage, norm in named.items() if isinstance(norm, nn.BatchNorm2d)}


def fold_norms(net: Network) -> Network:
    """Return `net` in eval mode, a ResNet with its batch norms folded into its convolutions."""
    return resnet.fold_norms(net) if isinstance(net, ResNet) else net.eval()
