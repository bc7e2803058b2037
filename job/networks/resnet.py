"""torchvision's ResNets with MoCo's head, and their stage features before the last ReLU."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from job.errors import RunError
from job.networks.outline import DEPTH, Outline

ARCHS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
)  # fmt: skip
STEMS = ("imagenet", "small")
WIDTH = 64  # channels of the first stage, as published
WIDTHS = range(16, 513, 16)  # valid for all ARCHS, whose convolutions have up to 64 groups


class MaxPool(nn.MaxPool2d):
    """torchvision's pooling of the stem, which saves only the maxima's indices for backward.

    torch also keeps the input, the largest map of all, although it reads only its shape.
    """

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the maxima, (b, C, H, W) -> (b, C, H', W')."""
        if not (torch.is_grad_enabled() and maps.requires_grad):
            return super().forward(maps)
        return MaxPoolByIndex.apply(maps, self.kernel_size, self.stride, self.padding)


class MaxPoolByIndex(torch.autograd.Function):
    """The function of `MaxPool`, by torch's own operations."""

    @staticmethod
    def forward(ctx: Any, maps: torch.Tensor, *window: int) -> torch.Tensor:
        """Return the maxima, (b, C, H', W'). window: size, stride and padding."""
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(maps, *([size] for size in window))
        ctx.save_for_backward(indices)
        ctx.window, ctx.shape = window, maps.shape
        ctx.layout = (
            torch.channels_last
            if maps.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        """Return the gradient of the maps, (b, C, H, W): each maximum's, at its index."""
        (indices,) = ctx.saved_tensors
        spread = torch.empty(
            ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout
        )
        window = [[size] for size in ctx.window]
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            gradient, spread, *window, [1], False, indices, grad_input=spread
        )
        return spread, None, None, None


def build_resnet(
    arch: str,
    dim: int = 128,
    mlp: bool = False,
    stem: str = "imagenet",
    width: int = WIDTH,
    zero_init_residual: bool = False,
    head_width: int = 0,
) -> models.ResNet:
    """Return a ResNet whose `fc` gives `dim` outputs.

    mlp: with one hidden layer (arXiv 2003.04297, section 3). head_width: of that layer (0: the
    number of features). stem: "imagenet" is the published one; "small", for images of about 32
    pixels, has a 3x3 convolution of stride 1 and no pooling (arXiv 1512.03385, section 4.2).
    width: channels of the first stage, a multiple of 16. The others are in proportion
    (arXiv 1605.07146, section 2). zero_init_residual: the weights of the last batch norm of each
    block start at 0 (arXiv 1706.02677, section 5.1).

    At 64 channels, outputs and names are torchvision's, to the bit. The stem's pooling is before
    its ReLU: the maximum is the same, and the backward pass needs two fewer maps of half the
    images' height and width.
    """
    if arch not in ARCHS:
        raise RunError(f"{arch}: expected a ResNet of torchvision: {', '.join(ARCHS)}")
    net = getattr(models, arch)(num_classes=dim, zero_init_residual=zero_init_residual)
    if width != WIDTH:
        change_width(net, width)
    net.relu = nn.Identity()
    net.maxpool = nn.Sequential(MaxPool(3, stride=2, padding=1), nn.ReLU(inplace=True))
    if stem == "small":
        net.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.ReLU(inplace=True)
    if mlp:
        features = net.fc.in_features
        last = nn.Linear(head_width, dim) if head_width else net.fc
        net.fc = nn.Sequential(nn.Linear(features, last.in_features), nn.ReLU(), last)
    return net


@torch.no_grad()
def change_width(net: models.ResNet, width: int) -> None:
    """Multiply the channels of a new network by width / 64, with torchvision's initial weights."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Conv2d):
            layer.in_channels = 3 if layer.in_channels == 3 else layer.in_channels * width // WIDTH
            layer.out_channels = layer.out_channels * width // WIDTH
            shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
            layer.weight = nn.Parameter(torch.empty(shape, device=layer.weight.device))
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(layer.num_features * width // WIDTH)
            norm.weight.copy_(layer.weight[0])
            net.set_submodule(name, norm)
    net.fc = nn.Linear(net.fc.in_features * width // WIDTH, net.fc.out_features)


def resnet_features(net: models.ResNet, stages: list[int], output: str | None) -> nn.Module:
    """Return `net` as a module with a dict of tensors as output, the same parameters and names.

    "layer1".."layer4" for `stages`: the sums before the stages' last ReLU, (b, C, H, W). In
    addition the node `output`: "fc" (b, dim), or "flatten" (b, C), the features under the head.
    If `output` is None, the layers after the last stage are not computed.
    """
    nodes = {
        f"layer{stage}.{len(getattr(net, f'layer{stage}')) - 1}.add": f"layer{stage}"
        for stage in stages
    }
    if output is not None:
        nodes[output] = output
    traced: Any = create_feature_extractor(net, nodes, tracer_kwargs={"leaf_modules": [MaxPool]})
    for graph in (traced.train_graph, traced.eval_graph):
        add_in_place(graph)
    traced.graph = traced.train_graph if traced.training else traced.eval_graph  # compiles it
    module: nn.Module = traced
    return module


def add_in_place(graph: Graph) -> None:
    """Compute the sums of a traced ResNet in place, and the ReLUs after its features not in place.

    Tracing makes `+=` a `+`, which needs another map. A ReLU in place would overwrite the features.
    """
    features = graph.output_node().all_input_nodes
    for node in graph.nodes:
        if node.target is operator.add:
            node.target = operator.iadd
        elif node.op == "call_module" and "relu" in node.target and node.args[0] in features:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(F.relu, node.args))
            graph.erase_node(node)


def stage_norms(net: models.ResNet) -> dict[int, nn.BatchNorm2d]:
    """Return the last batch norm of each stage, {stage: norm}, with the stage's channels."""
    blocks = {stage: getattr(net, f"layer{stage}")[-1] for stage in range(1, DEPTH + 1)}
    return {
        stage: block.bn3 if hasattr(block, "bn3") else block.bn2 for stage, block in blocks.items()
    }


def stage_widths(arch: str, width: int) -> dict[int, int]:
    """Return the channels of each stage of a ResNet, {stage: S}."""
    with torch.device("meta"):
        net = build_resnet(arch, width=width)
    return {stage: norm.num_features for stage, norm in stage_norms(net).items()}


def resnet_outline(arch: str, stem: str, width: int, image_size: int) -> Outline:
    """Return the features of a ResNet for images of `image_size` pixels."""
    widths, sides = stage_widths(arch, width), stage_sides(stem, image_size)
    maps = {stage: (widths[stage], sides[stage], sides[stage]) for stage in widths}
    return Outline(widths[DEPTH], maps)


def stage_sides(stem: str, image_size: int) -> dict[int, int]:
    """Return the height, equal to the width, of each stage's maps, {stage: H}."""
    first = 1 if stem == "small" else 4  # the stem's stride
    return {stage: -(-image_size // (first * 2 ** (stage - 1))) for stage in range(1, DEPTH + 1)}


@torch.no_grad()
def fold_norms(net: models.ResNet) -> models.ResNet:
    """Fold every batch norm into the convolution before it. Return `net`, for eval mode only.

    Each fold saves one pass over memory. The function is the same except for rounding. The names
    in the state change.
    """
    net.eval()
    for module in list(net.modules()):
        # 0 and 1 are a shortcut's.
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())
    return net
