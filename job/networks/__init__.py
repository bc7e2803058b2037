"""Networks of torchvision, timm and users, their heads and features.

A network is a backbone and a head. The backbone's stages give maps (b, C, H, W), its end pooled
features (b, C), and the head on them outputs (b, dim). An encoder is a network whose backbone and
head have the names `body` and `fc`. An outline lists the sizes of a network's features.

Shape letters: b images, C channels or features, H x W height and width, H' x W' after a
pooling or resize, dim outputs of the head.
"""

from job.networks.build import (
    Network,
    build_network,
    fold_norms,
    network_outline,
    stage_norms,
    with_features,
)
from job.networks.encoder import Encoder, EncoderFeatures, Input
from job.networks.heads import build_head, build_layer, build_mlp, hidden_layer
from job.networks.layout import to_channels_last
from job.networks.names import check_name, demands_size, is_own, used_packages
from job.networks.outline import DEPTH, HEAD, POOLED, UNDER_HEAD, Outline
from job.networks.resnet import (
    ARCHS,
    STEMS,
    WIDTH,
    WIDTHS,
    MaxPool,
    build_resnet,
    change_width,
    stage_sides,
    stage_widths,
)

__all__ = [
    "ARCHS",
    "DEPTH",
    "HEAD",
    "POOLED",
    "STEMS",
    "UNDER_HEAD",
    "WIDTH",
    "WIDTHS",
    "Encoder",
    "EncoderFeatures",
    "Input",
    "MaxPool",
    "Network",
    "Outline",
    "build_head",
    "build_layer",
    "build_mlp",
    "build_network",
    "build_resnet",
    "change_width",
    "check_name",
    "demands_size",
    "fold_norms",
    "hidden_layer",
    "is_own",
    "network_outline",
    "stage_norms",
    "stage_sides",
    "stage_widths",
    "to_channels_last",
    "used_packages",
    "with_features",
]
