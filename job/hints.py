"""Log the normal course of a training, and hints with likely causes when a run leaves it."""

from collections.abc import Sequence

from job.distill.base import Distiller
from job.distill.options import DistillOptions
from job.frameworks.base import Framework
from job.metrics.schema import RANGE, own_size

STEPS = 20  # for a hint. A run can resume shortly before an epoch's end
# Measured on ResNet-18 and the digits. The distillation loss is 0.006 to 0.04 times the contrastive
# one with the demo's --loss-factor of 1e5, and 35 times with 100. In the study's first epochs it is
# 5 times with a --loss-share of 10 and 10 times with 25. Both students did well. Waiting for images
# is 2 to 9 % of the time.
PULL, WAIT = 30.0, 0.5
WEAK = 0.01  # of the reference loss: a weaker loss at the start trains the student little


class Expectation:
    """The normal course of a training on `images` images. Each hint is given once."""

    def __init__(
        self,
        config: DistillOptions,
        framework: Framework,
        images: int,
        distillers: Sequence[Distiller] = (),
    ):
        self.config, self.framework, self.images = config, framework, images
        self.distillers = distillers
        self.records: list[dict[str, float]] = []  # of steps that hints have not covered
        self.given: set[str] = set()

    def lines(self) -> list[str]:
        """Return log lines on the normal course of a run, for its start."""
        config, framework = self.config, self.framework
        lines = [f"expected: {sentence}" for sentence in framework.expected()]
        if config.teacher:
            scaled = f"--loss-factor {config.loss_factor:g} divides it"
            if config.loss_share:
                scaled = (
                    f"it begins near {config.loss_share * framework.reference:.2g}, "
                    f"--loss-share {config.loss_share:g} of {framework.reference_text}"
                )
            others = " that falls"
            if framework.losses:
                others = f" below {self.other()}, or a few times it on an epoch's average"
                others += f" (ratio under {PULL:.0f})"
            lines.append(f"expected: distillation loss{others}; {scaled}")
        return lines

    def other(self) -> str:
        """Return the name of the loss with which the distillation loss is compared."""
        name = self.framework.losses[0]
        return f"the range of the {name} loss" if name in RANGE else f"the {name} one"

    def warnings(self) -> dict[str, str]:
        """Return {id: sentence} of the options that do not fit the images."""
        warnings = self.framework.misfits(self.images)
        for distiller in self.distillers:
            warnings |= distiller.misfits(self.images)
        return warnings

    def first(self, record: dict[str, float]) -> dict[str, str]:
        """Return {id: sentence} of anomalies in the record of a run's first step."""
        framework, several = self.framework, len(self.distillers) > 1
        if not framework.losses or self.config.loss_share:
            return {}
        names = {each.name: each.name if several else "distillation" for each in self.distillers}
        losses = {name: record[key] for name, key in names.items()}
        limit = WEAK * framework.reference
        weak = {name: loss for name, loss in losses.items() if 0 < loss < limit}
        if not weak:
            return {}
        shown = ", ".join(f"{name} {loss:.2g}" for name, loss in weak.items())
        sentence = (
            f"losses of distillers begin under {100 * WEAK:.0f} % of {framework.reference_text}, "
            f"{framework.reference:.4g}, and train the student little: {shown}, with --loss-factor "
            f"{self.config.loss_factor:g}. Start a new run with --loss-share 10"
        )
        return {"weak": sentence}

    def hints(self, records: list[dict[str, float]]) -> dict[str, str]:
        """Return {id: sentence} of new anomalies in the records of an epoch's steps.

        The steps of an epoch that is too short count with the next one's.
        """
        self.records += records
        if len(self.records) < STEPS:
            return {}
        means = {
            name: sum(record[name] for record in self.records) / len(self.records)
            for name in self.records[0]
        }
        self.records = []
        hints = self.framework.hints(means) | {"pull": self.ratio(means), "wait": self.wait(means)}
        new = {id: hint for id, hint in hints.items() if hint and id not in self.given}
        self.given |= new.keys()
        return new

    def ratio(self, means: dict[str, float]) -> str | None:
        """Return a hint if the distillation outweighs the framework's loss."""
        names = self.framework.losses
        ratio = means["distillation"] / max(own_size(means, names), 1e-9) if names else 0.0
        if ratio < PULL:
            return None
        factor, share = self.config.loss_factor, self.config.loss_share
        equal = f"--loss-factor {factor * ratio:.2g}"
        if share:
            equal = f"--loss-share {share / ratio:.2g}"
        return (
            f"the distillation loss is {ratio:.3g} times {self.other()}: the student learns little "
            f"from its {names[0]} loss. {equal} would make them equal (now {share or factor:g})"
        )

    def wait(self, means: dict[str, float]) -> str | None:
        """Return a hint if images load too slowly."""
        if means["data_wait"] < WAIT:
            return None
        return (
            f"{100 * means['data_wait']:.0f} % of the time is waiting for images: try more "
            f"--workers (now {self.config.workers} a worker), packed data (python -m job.pack), or "
            "--augment-on device on GPUs"
        )
