"""Load, check and freeze the teacher, and fold its batch norms."""

from dataclasses import dataclass, field

import torch
from torch import nn

from job.checkpoints.foreign import Backbone, digest, read_backbone
from job.checkpoints.other_networks import of_teacher
from job.cluster import comm
from job.distill.options import DistillOptions
from job.engine.run import Run
from job.errors import RunError, of_option
from job.networks import (
    ARCHS,
    HEAD,
    Network,
    Outline,
    build_head,
    fold_norms,
    network_outline,
    stage_norms,
    to_channels_last,
    with_features,
)


@dataclass(frozen=True)
class Teacher:
    """A frozen network in eval mode."""

    # Normalised (b, 3, H, W) -> {"layerN": (b, T, H, W)} before the last ReLU, and "fc" of a head.
    net: nn.Module
    norms: dict[int, nn.BatchNorm2d]  # the last of each stage that ends in one: T channels
    digest: str  # of the weights in its file
    shown: str  # network and width, for messages
    head_dim: int = 0  # d, outputs of its head "fc" (b, d); 0: the head is not built
    has_head: bool = False  # whether its file has a head
    outline: Outline = field(default_factory=lambda: Outline(0))  # of its features

    @property
    def widths(self) -> dict[int | str, int]:
        """The channels of each stage's maps {stage: T} and of the pooled features {"pooled": T}."""
        return self.outline.widths

    def features(self, images: torch.Tensor, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features of normalised images (b, 3, H, W).

        indices: of the images in the run's set, (b,) int64 on the CPU. A network ignores them.
        """
        features: dict[str, torch.Tensor] = self.net(images)
        return features

    def state(self) -> dict[str, torch.Tensor]:
        """Return its tensors by name."""
        return {f"teacher.{name}": value for name, value in self.net.state_dict().items()}


def load_teacher(config: DistillOptions, stages: list[int], needs_head: bool, run: Run) -> Teacher:
    """Load the teacher of a run's options, with the features of `stages`. A collective.

    needs_head: whether to build its head. RunError: its file cannot be used, its stem differs from
    the student's, its head is missing, or its network does not accept the images' size.
    """
    path, arch, image_size = config.teacher, config.teacher_arch, config.image_size
    with of_option("--teacher", path):
        weights = run.on_first(lambda: read_backbone(path, arch, size=config.teacher_size))
    if config.arch in ARCHS and weights.is_resnet and weights.stem != config.stem:
        problem = f"--teacher {path}: its stem is {weights.stem}; expected {config.stem}"
        raise RunError(f"{problem}, as in the student. Choose --stem {weights.stem}")
    net = run.build(weights.arch, lambda: build(weights, image_size))
    side = weights.image_size or image_size
    outline = network_outline(weights.arch, weights.stem, weights.width, side)
    state, head_dim = weights.state, 0
    if needs_head:
        head_dim = add_head(net, weights, path)
        state = state | {f"{HEAD}.{name}": value for name, value in weights.head_state.items()}
    used = "; its head is used" if needs_head else ""
    run.log.record("teacher", f"teacher {weights.report}{used}", arch=weights.arch, path=path)
    norms = stage_norms(net)
    features = with_features(fold_norms(net), stages, output=HEAD if needs_head else None)
    frozen = features.eval().requires_grad_(False)
    # fold_norms may round differently on another type of processor.
    comm.broadcast_(frozen.state_dict())
    to_channels_last(frozen.to(run.device))
    if config.precision == "bf16" and weights.is_resnet:
        store_in_bf16(frozen)
    shown = f"{weights.arch}, width {weights.width}" if weights.is_resnet else weights.arch
    has_head = bool(weights.head_state)
    return Teacher(frozen, norms, digest(state), shown, head_dim, has_head, outline)


def build(weights: Backbone, image_size: int) -> Network:
    """Return the network. RunError: it does not accept images of its own size or the student's."""
    try:
        return weights.build(image_size)
    except RunError as error:
        raise RunError(of_teacher(str(error)) if weights.image_size else str(error)) from None


def store_in_bf16(net: nn.Module) -> None:
    """Convert the weights once that autocast would convert in each pass, to the same bytes."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bfloat16()


def add_head(net: Network, weights: Backbone, path: str) -> int:
    """Put the head of a file on its network, and return the number of its outputs.

    RunError: the file has no head, or one that cannot be built.
    """
    expected = "expected linear layers, batch norms and ReLUs, as MoCo and SimSiam save them"
    fix = "Use another file, or distillers that need no head"
    if not weights.head_state:
        raise RunError(f"--teacher {path}: no head on its network; {expected}. {fix}")
    assert isinstance(net.fc, nn.Linear)
    features = net.fc.in_features
    try:
        head = build_head(weights.head_state)
        outputs = head(torch.zeros(1, features)).shape[1]
    except (ValueError, RuntimeError) as error:
        cause = f"its head ({weights.head}) cannot be used: {str(error).splitlines()[0]}"
        raise RunError(f"--teacher {path}: {cause}; {expected}. {fix}") from None
    net.fc = head
    return outputs
