"""A training run: its networks, optimizer, batches and checkpoints."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from job.config import Config
from job.data.augment import RandomView, normalize
from job.data.folders import TrainingOrder
from job.data.images import Images
from job.data.render_batch import render
from job.data.views import NumberedViews
from job.distill.distillation import Distillation
from job.engine import replicas, statistics
from job.engine.gradients import Gradients
from job.engine.resume import check_finite
from job.engine.run import Run
from job.frameworks import Framework
from job.frameworks.base import MicroBatch
from job.position import Position

# Keys of each checkpoint. It also has the state of each distiller, under the distiller's name, and
# of the momentum encoder, if a distiller needs one.
CHECKPOINT = {"epoch", "arch", "state_dict", "optimizer", "step", "steps", "teacher", "bad_images"}
CHECKPOINT |= {"config", "workers", "images", "order", "statistics", "format", "version"}


@dataclass
class Training:
    """A training run."""

    config: Config
    run: Run
    images: Images
    val: Images | None  # for --knn-every
    framework: Framework
    distillation: Distillation
    trained: nn.ModuleDict  # modules of the framework and the distillers by name: saved, restored
    gradients: Gradients
    optimizer: torch.optim.Optimizer

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.images) // self.config.batch_size

    @property
    def batch_size(self) -> int:
        """Images of this worker in a step."""
        return self.run.own_batch(self.config.batch_size)

    def shared(self) -> dict[str, torch.Tensor]:
        """Return all tensors that are the same on every worker, by name.

        The teacher is included, because a damaged one changes the gradients of all workers.
        """
        return replicas.shared(self.trained, self.optimizer) | self.distillation.frozen()

    def order(self, epoch: int) -> str:
        """Return the digest of the names of an epoch's images, in their order."""
        return self.images.digest(self.config.seed, epoch, self.config.batch_size)

    def batches(
        self, start: Position
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, list[str]]]:
        """Return an iterator over this worker's steps from `start` on.

        Each is the framework's number of views (B, 3, H, W) uint8, on its device, the indices of
        their images (B,) int64, on the CPU, and the undecodable files.
        """
        config, run = self.config, self.run
        order = TrainingOrder(
            self.images, config.batch_size, run.rank, run.size, config.seed, config.epochs, start
        )
        view = RandomView(config.image_size, config.aug_plus, config.crop_min, config.weak_views)
        number, rendered = self.framework.views, config.augment_on == "cpu"
        views = NumberedViews(self.images, view, number, config.seed, rendered)
        return map(self.on_device, run.batches(views, order, config.workers))

    def on_device(self, batch: tuple) -> tuple[list[torch.Tensor], torch.Tensor, list[str]]:
        """Return a loader's batch, its views on the device and rendered."""
        *views, indices, undecodable = batch
        device = self.run.device
        if self.config.augment_on == "cpu":
            moved = [view.to(device, non_blocking=True) for view in views]
            return moved, indices, undecodable
        crops, appearances = zip(*views, strict=True)
        images = torch.cat([crop.to(device, non_blocking=True) for crop in crops])
        rendered = render(images, torch.cat(appearances)).chunk(len(crops))
        return list(rendered), indices, undecodable

    def micro_batches(
        self, views: list[torch.Tensor], indices: torch.Tensor, position: Position
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step's views, normalised.

        views: (B, 3, H, W) uint8 each. indices: of their images, (B,) int64.
        """
        first, parts = self.run.rank * len(views[0]), self.config.accumulate
        seen = views[: self.framework.student_views]
        chunks = [indices.chunk(parts), *(normalize(view).chunk(parts) for view in seen)]
        for number, (chosen, images, *others) in enumerate(zip(*chunks, strict=True)):
            start = first + number * len(images)
            yield MicroBatch(images, position, number, start, tuple(others), chosen)

    def save(self, position: Position) -> None:
        """Save the run at a position. A collective: all workers call it.

        Running statistics are averaged over the workers. Within an epoch each worker's own are
        saved too, so that a resumed run computes the same bytes.
        RunError: parameters are not finite or differ between workers, or the disk is full.
        """
        run, trained = self.run, self.trained
        check_finite(trained.parameters(), *position)
        replicas.check(
            self.shared(), f"after epoch {position.epoch}, step {position.step}, and are not saved"
        )
        own = statistics.gather(trained) if position.step else None
        if own is not None:
            statistics.load(trained, own.mean(0))
        run.on_first(lambda: run.save(self.content(position, own)))
        if own is not None:
            statistics.load(trained, own[run.rank])

    def content(self, position: Position, own: torch.Tensor | None) -> dict:
        """Return a checkpoint's content. own: the workers' statistics (N, D), within an epoch."""
        modules = self.distillation.modules()
        optimizer = self.optimizer.state_dict()
        return {
            "epoch": position.epoch,
            "arch": self.config.arch,
            "state_dict": {
                f"module.{key}": value
                for key, value in contiguous(self.framework.module.state_dict()).items()
            },
            "optimizer": optimizer
            | {"state": {n: contiguous(dict(each)) for n, each in optimizer["state"].items()}},
            "step": position.step,
            "steps": self.run.count.at(*position),
            "mgd": {},
            **{name: contiguous(module.state_dict()) for name, module in modules.items()},
            "teacher": self.distillation.digest,
            "bad_images": sorted(self.run.bad_images),
            "config": dataclasses.asdict(self.config),
            "workers": self.run.size,
            "images": len(self.images),
            "order": self.order(position.epoch),
            "statistics": own,
        }


def contiguous(state: dict) -> dict:
    """Make the tensors of a state contiguous, as other programs expect them. Return the state."""
    for name, value in state.items():
        if torch.is_tensor(value):
            state[name] = value.contiguous()
    return state
