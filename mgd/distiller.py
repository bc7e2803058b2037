"""The distiller: what stands between the student's stages and the teacher's, and is trained and saved with the student."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mgd.correction import Correction
from mgd.loss import partial_l2
from mgd.margin import margin_from_bn
from mgd.reducers import REDUCERS, Reduced


class MGDistiller(nn.Module):
    """Distillation loss over stages 1..L of two networks (arXiv 2008.09958, algorithm 1).

    Per stage it holds a learnt batch norm BN_i of the student's features, the teacher's margins (T,) and
    the matching (G, S); margins, matchings and the loss factor are buffers, so that they are saved and restored with it.

    channels: {stage: (S, T)}, stages counted from 1 as in `layer1`; a subset of them is allowed.
    depth: L, the number of stages of the networks; stage i weighs 1 / 2^(L - i), unless `weights`, {stage: weight}, has another.
    factor: the loss factor; the loss is divided by (images x factor).
    correction: with a learnt Correction of each stage's student features, before BN_i.
    ValueError: a stage whose teacher has fewer channels than the student, or an unknown reducer.
    """

    factor: torch.Tensor  # () float64

    def __init__(
        self,
        channels: Mapping[int, tuple[int, int]],
        reducer: str = "amp",
        factor: float = 1e4,
        depth: int = 4,
        weights: Mapping[int, float] | None = None,
        correction: bool = False,
    ):
        super().__init__()
        if reducer not in REDUCERS:
            raise ValueError(f"reducer {reducer!r} is none of {', '.join(REDUCERS)}")
        self.reducer = reducer
        self.stages = sorted(channels)
        self.correction = correction
        self.weights = {stage: 1 / 2 ** (depth - stage) for stage in self.stages} | dict(
            weights or {}
        )
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float64))
        for stage in self.stages:
            S, T = channels[stage]
            if T < S:
                raise ValueError(
                    f"stage {stage}: a teacher of {T} channels has too few for a student of {S}"
                )
            G = 1 if reducer == "sm" else T // S
            self.add_module(f"bn{stage}", nn.BatchNorm2d(S))
            if correction:
                self.add_module(f"correction{stage}", Correction(S))
            self.register_buffer(f"margin{stage}", margin_from_bn(torch.ones(T), torch.zeros(T)))
            self.register_buffer(f"matching{stage}", torch.arange(G * S).view(G, S))

    def margin(self, stage: int) -> torch.Tensor:
        """The teacher's margins of a stage, (T,)."""
        return self.get_buffer(f"margin{stage}")

    def matching(self, stage: int) -> torch.Tensor:
        """The matching of a stage, (G, S) int64: column a lists the teacher channels of student channel a."""
        return self.get_buffer(f"matching{stage}")

    def corrected(self, stage: int, student: torch.Tensor) -> torch.Tensor:
        """Return what BN_i normalises, and a matching compares, of the student's features (B, S, H, W).

        These are the features themselves without a correction.
        """
        return self.get_submodule(f"correction{stage}")(student) if self.correction else student

    @torch.no_grad()
    def load_margins(self, norms: Mapping[int, nn.BatchNorm2d]) -> None:
        """Take the margins from the last batch norm of each of the teacher's stages, {stage: norm}."""
        for stage in self.stages:
            self.margin(stage).copy_(margin_from_bn(norms[stage].weight, norms[stage].bias))

    @torch.no_grad()
    def targets(
        self, teacher: Sequence[torch.Tensor], generator: torch.Generator | None = None
    ) -> list[Reduced]:
        """Return what the student is to imitate of the teacher's features before the last ReLU, (B, T, H, W) a stage.

        Of them all it is the share S / T, so that the rest need not be held while the student computes.
        """
        reduce = REDUCERS[self.reducer]
        return [
            reduce(t, self.margin(n), self.matching(n), generator)
            for n, t in zip(self.stages, teacher, strict=True)
        ]

    def forward(self, student: Sequence[torch.Tensor], targets: Sequence[Reduced]) -> torch.Tensor:
        """Return the distillation loss, a scalar, of the student's features before the last ReLU, (B, S, H, W) a stage.

        ValueError: features or targets are not of as many stages as there are.
        """
        total = torch.zeros((), device=student[0].device)
        for stage, s, (target, margin) in zip(self.stages, student, targets, strict=True):
            normalised = self.get_submodule(f"bn{stage}")(self.corrected(stage, s))
            distance = partial_l2(normalised, target, margin)
            total = total + distance * self.weights[stage]
        return total / (student[0].shape[0] * self.factor).to(total.dtype)
