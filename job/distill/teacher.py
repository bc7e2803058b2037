"""The frozen teacher: load, check, fold, freeze."""

from dataclasses import dataclass

import torch
from torch import nn

from job.checkpoints.foreign import read_backbone
from job.cluster import comm
from job.engine.run import Run
from job.errors import RunError
from job.networks import build_resnet, fold_norms, stage_norms, with_features


@dataclass(frozen=True)
class Teacher:
    """A frozen network in eval mode."""

    net: nn.Module  # (b, 3, H, W), normalised -> {"layerN": (b, T, H, W)}, before the stage's last ReLU
    norms: dict[int, nn.BatchNorm2d]  # the last batch norm of each stage: T channels
    digest: str  # of the weights in its file
    shown: str  # network and width, for messages

    def state(self) -> dict[str, torch.Tensor]:
        """Return its tensors by name."""
        return {f"teacher.{name}": value for name, value in self.net.state_dict().items()}


def load_teacher(path: str, arch: str, stem: str, stages: list[int], run: Run) -> Teacher:
    """Load the teacher from a checkpoint, with the features of `stages`. A collective.

    arch: the network, or "" for what the file says. stem: the student's. RunError: the file cannot be used, or has another stem.
    """
    weights = run.on_first(lambda: read_backbone(path, arch))
    if weights.stem != stem:
        raise RunError(f"{path} has the {weights.stem} stem, the student the {stem} one: choose --stem {weights.stem}")
    net = build_resnet(weights.arch, stem=weights.stem, width=weights.width)
    net.load_state_dict(weights.state, strict=False)  # only the head is missing: read_backbone has checked the rest
    run.log.record("teacher", f"teacher {weights.report}", arch=weights.arch, path=path)
    norms = stage_norms(net)
    frozen = with_features(fold_norms(net), stages, output=None).eval().requires_grad_(False)
    comm.broadcast_(frozen.state_dict())  # folding may round differently on another kind of processor
    frozen = frozen.to(run.device).to(memory_format=torch.channels_last)
    return Teacher(frozen, norms, weights.digest, f"{weights.arch}, width {weights.width}")
