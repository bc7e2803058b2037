"""All distillers of a run as one object."""

import numpy as np
import torch
from torch import nn

from job.cluster import comm
from job.data import randomness
from job.distill.base import Change, Distiller, Networks
from job.distill.loss_factor import measure_factor
from job.distill.momentum import MOMENTUM, MomentumEncoder
from job.distill.options import DistillOptions
from job.frameworks.base import MicroBatch, Output
from job.position import Position


class Distillation:
    """The distillers of a run, with one teacher for all. Without a teacher there are none.

    momentum: the momentum encoder, if a distiller needs one.
    """

    def __init__(
        self, config: DistillOptions, networks: Networks | None, distillers: list[Distiller]
    ):
        self.config, self.networks, self.distillers = config, networks, distillers
        # Pending gathers of the workers' rows (b, ...) by distiller, one for each micro-batch.
        self.gathers: dict[str, list[comm.Pending]] = {}
        momenta = [m for each in distillers if (m := each.momentum(config)) is not None]
        self.momentum: MomentumEncoder | None = None
        if networks and momenta:
            self.momentum = MomentumEncoder(networks.framework, max(momenta))

    @property
    def names(self) -> list[str]:
        """The distillers' names."""
        return [each.name for each in self.distillers]

    @property
    def weights(self) -> list[float]:
        """The distillers' --distill-weights."""
        return self.config.distill_weights or [1.0] * len(self.distillers)

    def modules(self) -> dict[str, nn.Module]:
        """Return all modules that a run saves and restores, by name in checkpoints."""
        modules = {each.name: each.module for each in self.distillers}
        return modules | ({MOMENTUM: self.momentum.module} if self.momentum else {})

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> list[list]:
        """Run the teacher and the momentum encoder on the distilled views of a micro-batch.

        Return each distiller's targets, one for each view. A collective: it starts the gathers
        of `to_gather`, which run during the student's passes.
        """
        if not self.networks:
            return []
        pairs = [(distiller, self.generator(batch)) for distiller in self.distillers]
        targets: list[list] = [[] for _ in pairs]
        teacher = self.networks.teacher
        for images in (batch.images, *batch.others)[: self.networks.framework.distilled_views]:
            features = teacher.features(images, batch.indices)  # {"layerN": (b, T, H, W)}
            if self.momentum:
                features = features | {MOMENTUM: self.momentum.pooled(images)}  # (b, S)
            for (distiller, generator), views in zip(pairs, targets, strict=True):
                views.append(distiller.targets(features, generator))
            del features  # release their memory for the next view's pass
        for distiller, (first, *_) in zip(self.distillers, targets, strict=True):
            if (rows := distiller.to_gather(first)) is not None:
                pending = self.gathers.setdefault(distiller.name, [])
                name = f"distill.{distiller.name}.{batch.index}"
                pending.append(comm.begin_gather(rows, name))
        return targets

    def after_update(self) -> None:
        """End a step, after the optimizer's update. A collective."""
        if self.momentum:
            self.momentum.update()
        for distiller in self.distillers:
            if pending := self.gathers.pop(distiller.name, None):
                batches = [comm.wait(each).unflatten(0, (comm.size(), -1)) for each in pending]
                total = torch.cat(batches, dim=1)  # (N, B, ...)
                distiller.after_update(total.flatten(0, 1))  # (NB, ...)

    def generator(self, batch: MicroBatch) -> torch.Generator:
        """Return the generator of a micro-batch's random targets."""
        generator = torch.Generator(batch.images.device)
        seed = randomness.torch_seed(self.config.seed, "drop", *batch.position, sample=batch.first)
        return generator.manual_seed(seed)

    def losses(
        self,
        output: Output,
        targets: list[list],
        position: Position,
        steps: int,
    ) -> dict[str, torch.Tensor]:
        """Return each distiller's weighted loss of a micro-batch, (), by name.

        It is a mean over the views. steps: of an epoch.
        """
        views = (output.features, *output.others)
        losses = {}
        for each, own, own_targets in zip(self.distillers, self.weights, targets, strict=True):
            first, *others = map(each.loss, views, own_targets)
            weight = own * each.weight(position, steps)
            losses[each.name] = weight * (sum(others, first) / len(views))
        return losses

    @property
    def digest(self) -> str:
        """The digest of the teacher's weights, or "" without a teacher."""
        return self.networks.teacher.digest if self.networks else ""

    def frozen(self) -> dict[str, torch.Tensor]:
        """Return the teacher's tensors by name."""
        return self.networks.teacher.state() if self.networks else {}

    def before_epoch(self, epoch: int) -> None:
        """Prepare an epoch. A collective.

        Stopped, on all workers: a signal arrived. Then nothing is changed or recorded.
        """
        changes: list[tuple[Distiller, Change]] = []
        for distiller in self.distillers:
            assert self.networks
            change = distiller.before_epoch(epoch, self.networks)
            changes.append((distiller, change))
            if epoch == 0 and self.config.loss_share:
                share = self.config.loss_share / sum(self.weights)
                changed = distiller.with_change(change)
                changes.append((distiller, measure_factor(changed, self.networks, share)))
        for distiller, change in changes:
            change.record()
            distiller.apply(change)

    def histograms(self) -> dict[str, np.ndarray]:
        """Return the distributions of all distillers, by "distiller/name"."""
        return {
            f"{each.name}/{name}": values
            for each in self.distillers
            for name, values in each.histograms().items()
        }
