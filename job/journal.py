"""Log lines and records of a training run's steps."""

from job.distill.options import DistillOptions
from job.frameworks.base import Framework
from job.hints import Expectation
from job.metrics import collapse
from job.metrics.meter import Journal, Recorded
from job.metrics.schema import ratio
from job.position import START


class TrainingJournal(Journal):
    """The journal of `job.train`: losses averaged over the workers, and the framework's metrics."""

    signs: dict[str, float] | None = None  # of collapse, the epoch's last

    def __init__(
        self,
        run: Recorded,
        config: DistillOptions,
        framework: Framework,
        distillers: list[str],
        expectation: Expectation,
    ):
        super().__init__(run, config.batch_size, config.print_freq)
        self.framework, self.distillers, self.expectation = framework, distillers, expectation
        self.parts = (*framework.losses, "distillation")
        others = {
            "a lower --loss-share": config.teacher and config.loss_share,
            "a higher --loss-factor": config.teacher and not config.loss_share,
            "--precision float32": config.precision != "float32",
            "no --fp16-allreduce": config.fp16_allreduce,
        }
        self.advice = " or ".join(
            ["A lower --lr", *(option for option, helps in others.items() if helps)]
        )

    def watch(self, step: int, signs: dict[str, float]) -> None:
        """Record the signs of collapse after a step. The epoch's end logs the last ones."""
        self.signs = signs
        self.run.log.record(
            "collapse",
            steps=self.run.count.at(self.epoch, step + 1),
            epoch=self.epoch,
            step=step,
            **signs,
        )

    def step(self, step: int, sums: dict[str, float]) -> None:
        """Record a step from its sums over the workers, with hints after a run's first one."""
        super().step(step, sums)
        if (self.epoch, step) == START:
            self.hint(self.expectation.first(self.records[-1]))

    def hint(self, hints: dict[str, str]) -> None:
        """Log and record hints, {id: sentence}."""
        for id, sentence in hints.items():
            self.run.log.remark("hint", id, sentence)

    def end_epoch(self) -> None:
        """Log an epoch's averages, the last signs of collapse, and warnings."""
        super().end_epoch()
        self.hint(self.expectation.hints(self.records))
        if self.signs:
            self.run.log.line(f"epoch {self.epoch} features: {collapse.describe(self.signs)}")
            for id, warning in self.framework.warnings(self.signs).items():
                self.run.log.remark("warning", id, warning)
        self.signs = None

    def numbers(self, sums: dict[str, float]) -> dict[str, float]:
        """Return losses and gradient norm averaged over workers, metrics averaged over images.

        `distillation` is the sum of all distillers' losses. Several have each their own by name.
        """
        N = self.run.size
        each = {name: sums[name] / N for name in self.distillers}
        means = {name: sums[name] / N for name in ("loss", *self.framework.losses)} | {
            "distillation": sum(each.values())
        }
        means |= each if len(each) > 1 else {}
        return {**means, "gradient_norm": sums["gradient"] / N} | {
            name: sums[name] / self.total for name in self.framework.metrics
        }

    def losses(self, numbers: dict[str, float]) -> str:
        """Return the loss as a sum, the ratio of distillation to other losses, and the metrics."""
        parts = [f"{name} {numbers[name]:.4f}" for name in self.framework.losses]
        if numbers["distillation"]:
            to_others = ratio(numbers, self.framework.losses)
            shown = f" (ratio {to_others:.2f})" if to_others else ""
            parts.append(f"distillation {numbers['distillation']:.4f}{shown}")
        loss = f"loss {numbers['loss']:.4f} = {' + '.join(parts)}"
        return ", ".join(filter(None, [loss, self.framework.describe(numbers)]))
