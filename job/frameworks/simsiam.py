"""SimSiam (arXiv 2011.10566), as a framework: attract two views of an image, without negatives.

Its state has the names of the released checkpoints: `encoder`, with the projector as `fc`, and
`predictor`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.declare import option
from job.engine.sync_norm import synchronise
from job.errors import RunError
from job.frameworks.base import Framework, MicroBatch, Output
from job.metrics import collapse
from job.networks import HEAD, hidden_layer, with_features
from job.options import Options

# Steps, and losses. Measured as means of epochs, with ResNet-18 of width 16 on the digits: a batch
# of 64, 22 steps an epoch. At a rate of 0.1 the loss is 0.00 in the first epoch, -0.44 in the third
# and -0.79 in the sixth. At 0.5 it is -0.18, -0.83 and -0.91. At 0.0125 it is 0.00 in the first
# three. None has collapsed.
LEARNT, STUCK, COLLAPSED = 100, -0.02, -0.98
# By --sync-bn, the prefixes of the names of synchronised batch norms.
SYNCHRONISED = {"all": ("",), "heads": (f"encoder.{HEAD}.", "predictor."), "none": ()}
FIX_PRED_LR = "the predictor's learning rate is always --lr, as in the published training"
SYNC_BN = "batch norms with the statistics of all workers' images"
MGD_VIEWS = "views that are distilled; the second needs another pass of the teacher"


@dataclass(frozen=True)
class SimSiamOptions(Options):
    """SimSiam."""

    group = "simsiam"

    dim: int = option(2048, "width of the compared features", at_least=1, at_most=2**14)
    pred_dim: int = option(512, "width of the predictor's hidden layer", at_least=1, at_most=2**14)
    fix_pred_lr: bool = option(False, FIX_PRED_LR)
    sync_bn: str = option("all", SYNC_BN, choices=tuple(SYNCHRONISED))
    mgd_views: int = option(2, MGD_VIEWS, at_least=1, at_most=2)


class SimSiam(nn.Module):
    """An encoder, which returns features and "fc" (b, dim), and a predictor of (b, dim)."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor


def build_projector(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Return the projector f, (b, width) -> (b, dim) (section 3)."""
    last = nn.Linear(hidden, dim)
    last.bias.requires_grad_(False)  # released checkpoints have it; the batch norm cancels it
    first = [*hidden_layer(width, hidden, bias=False), *hidden_layer(hidden, hidden, bias=False)]
    return nn.Sequential(*first, last, nn.BatchNorm1d(dim, affine=False))


def build_predictor(dim: int, hidden: int) -> nn.Sequential:
    """Return the predictor h, (b, dim) -> (b, dim) (section 3)."""
    return nn.Sequential(*hidden_layer(dim, hidden, bias=False), nn.Linear(hidden, dim))


def similarity(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine, (), of predictions p and constant projections z, (b, dim) each."""
    return F.cosine_similarity(p.float(), z.detach().float()).mean()


class SimSiamFramework(Framework):
    """SimSiam."""

    name = "simsiam"
    losses = ("cosine",)
    views = student_views = 2
    reference, reference_text = 1.0, "the range of the cosine loss"
    shapes = ("dim", "pred_dim", "head_width", "fix_pred_lr", "sync_bn")
    config: SimSiamOptions
    module: SimSiam

    def __init__(self, config: SimSiamOptions, stages: list[int]):
        """RunError: collectives would be compiled."""
        super().__init__(config, stages)
        if config.compile and config.sync_bn != "none" and comm.size() > 1:
            raise RunError(
                f"--compile: --sync-bn {config.sync_bn} over {comm.size()} workers needs "
                "collectives, which cannot be compiled; expected --sync-bn none. Set it, or leave "
                "out --compile"
            )
        self.distilled_views, self.head_dim = config.mgd_views, config.dim
        net, dim = self.network(), config.dim
        assert isinstance(net.fc, nn.Linear)
        width = net.fc.in_features
        net.fc = build_projector(width, config.head_width or width, dim)
        self.encoder = with_features(net, stages, HEAD)
        self.module = SimSiam(self.encoder, build_predictor(dim, config.pred_dim))
        synchronise(self.module, SYNCHRONISED[config.sync_bn])

    def distil(self, views: int) -> None:
        """Do nothing, because --mgd-views sets the number of distilled views."""

    def constant_rate(self) -> list[nn.Parameter]:
        """Return the predictor's parameters, with --fix-pred-lr."""
        return list(self.module.predictor.parameters()) if self.config.fix_pred_lr else []

    def forward(self, batch: MicroBatch, prepared: None) -> Output:
        """Compare a micro-batch's views (equation 4). Each view has its own batch statistics."""
        features = [self.encoder(images) for images in (batch.images, *batch.others)]
        z1, z2 = (each[HEAD] for each in features)  # (b, dim) each
        p1, p2 = (self.module.predictor(z) for z in (z1, z2))
        loss = -(similarity(p1, z2) + similarity(p2, z1)) / 2
        embeddings = F.normalize(z1.detach().float(), dim=1)
        first, *others = features[: self.distilled_views]
        return Output({"cosine": loss}, first, embeddings, {}, tuple(others))

    def warnings(self, signs: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} about the signs of collapse, with their likely causes."""
        return collapse.warnings(signs, "--lr is too high")

    def expected(self) -> list[str]:
        """Return the normal course of the loss and the spread."""
        return [
            "cosine loss near 0, as of unrelated vectors, in the first steps. Then it falls "
            "towards -1 and ends above it (-0.93 in the published training of ResNet-50). If it is "
            "near -1 in the first epoch, the student has collapsed",
            "spread of the features near 1. If it is near 0, the student has collapsed",
        ]

    def misfits(self, images: int) -> dict[str, str]:
        """Return {id: sentence} if batch norms are not synchronised."""
        if self.config.sync_bn != "none" or comm.size() == 1:
            return {}
        own = self.config.batch_size // comm.size() // self.config.accumulate
        sentence = (
            f"--sync-bn none: a batch norm has the statistics of only {own} images of its worker; "
            "in the published training the accuracy then fell from 68.0 to 65.1. Use --sync-bn all"
        )
        return {"unsynchronised": sentence}

    def hints(self, means: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} about a loss that is near -1 too early, or stays near 0."""
        hints = {"collapsed": collapsed(means), "stuck": stuck(self.config, means)}
        return {id: hint for id, hint in hints.items() if hint}


def collapsed(means: dict[str, float]) -> str | None:
    """Return a hint if the student has similar features for all images from the start."""
    loss = means["cosine"]
    if means["epoch"] >= 1 or loss > COLLAPSED:
        return None
    return (
        f"the cosine loss is {loss:.3f} in the first epoch, near its lowest value of -1: the "
        "student has probably collapsed. Check whether --lr is too high, or the images too similar"
    )


def stuck(config: SimSiamOptions, means: dict[str, float]) -> str | None:
    """Return a hint if the loss is still that of unrelated vectors when it should have fallen."""
    early = means["steps"] < LEARNT or means["epoch"] < max(1, config.warmup_epochs)
    loss, published = means["cosine"], 0.05 * config.batch_size / 256
    if early or loss < STUCK:
        return None
    return (
        f"the cosine loss, {loss:.3f}, is still that of unrelated vectors: check whether --lr "
        f"{config.lr:g} is 0 or too low for so few steps (the published one is {published:.2g} for "
        f"a batch of {config.batch_size}), or --crop-min {config.crop_min:g} is too low"
    )
