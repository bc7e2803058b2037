"""The distiller: the loss between the stages of student and teacher, trained with the student."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mgd.correction import Correction
from mgd.loss import partial_l2
from mgd.margin import margin_from_bn
from mgd.reducers import REDUCERS, Reduced


class MGDistiller(nn.Module):
    """Distillation loss over stages 1..L of two networks (arXiv 2008.09958, algorithm 1).

    Each stage has a learnt batch norm BN_i of the student's features, the teacher's margins (T,)
    and the matching (G, S). Margins, matchings and the loss factor are buffers, so they are saved
    and restored with the module.

    channels: {stage: (S, T)}. Stages count from 1, as in `layer1`. A subset is allowed.
    depth: L, the number of stages of the networks.
    weights: {stage: weight}. Without an entry, stage i has the weight 1 / 2^(L - i).
    factor: the loss factor. The loss is divided by (images x factor).
    correction: apply a learnt Correction to each stage's student features, before BN_i.
    ValueError: a stage's teacher has fewer channels than the student, or the reducer is unknown.
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
            raise ValueError(f"reducer {reducer!r}: unknown; expected one of {', '.join(REDUCERS)}")
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
        """Return the teacher's margins of a stage, (T,)."""
        return self.get_buffer(f"margin{stage}")

    def matching(self, stage: int) -> torch.Tensor:
        """Return the matching of a stage, (G, S) int64.

        Column a lists the teacher channels of student channel a.
        """
        return self.get_buffer(f"matching{stage}")

    def corrected(self, stage: int, student: torch.Tensor) -> torch.Tensor:
        """Return the student's features after the correction, (B, S, H, W) -> (B, S, H, W).

        BN_i normalises them, and the matching compares them. Without a correction they are the
        input itself.
        """
        return self.get_submodule(f"correction{stage}")(student) if self.correction else student

    @torch.no_grad()
    def load_margins(self, norms: Mapping[int, nn.BatchNorm2d]) -> None:
        """Set the margins from the last batch norm of each teacher stage, {stage: norm}."""
        for stage in self.stages:
            self.margin(stage).copy_(margin_from_bn(norms[stage].weight, norms[stage].bias))

    @torch.no_grad()
    def targets(
        self, teacher: Sequence[torch.Tensor], generator: torch.Generator | None = None
    ) -> list[Reduced]:
        """Return each stage's target maps (B, S, H, W) and margins (S,).

        teacher: features before the last ReLU, (B, T, H, W) for each stage. The targets are S / T
        of their size, so you can release the features before the student's forward pass.
        """
        reduce = REDUCERS[self.reducer]
        return [
            reduce(t, self.margin(n), self.matching(n), generator)
            for n, t in zip(self.stages, teacher, strict=True)
        ]

    def forward(self, student: Sequence[torch.Tensor], targets: Sequence[Reduced]) -> torch.Tensor:
        """Return the distillation loss, a scalar.

        student: features before the last ReLU, (B, S, H, W) for each stage. targets: of `targets`.
        ValueError: the number of features or targets differs from the number of stages.
        """
        total = torch.zeros((), device=student[0].device)
        for stage, s, (target, margin) in zip(self.stages, student, targets, strict=True):
            normalised = self.get_submodule(f"bn{stage}")(self.corrected(stage, s))
            distance = partial_l2(normalised, target, margin)
            total = total + distance * self.weights[stage]
        return total / (student[0].shape[0] * self.factor).to(total.dtype)
