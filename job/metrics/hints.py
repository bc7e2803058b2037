"""What is normal for a training with given options, and hints where reality leaves it, each with its likely cause."""

import math

from job.config import Config

# Averages of fewer steps are not judged: of a run that was resumed shortly before an epoch's end, say.
STEPS = 20
# Measured on ResNet-18 and the digits, 256 negatives, two workers, 44 steps an epoch, as shares of ln(K + 1) and in percent:
# learning, 0.90 in the first epoch, 0.81 to 0.85 in the second, 0.24 in the 36th, accuracy 6, 8 to 10 and 61; at a rate of 0,
# 0.95, then 1.00 and an accuracy of 4. The distillation loss is 0.006 to 0.04 times the contrastive one with the demo's factor
# of 1e5, and 35 times with 100; in the study's first epochs it is 5 times with a share of 10 and 10 times with one of 25, both
# of which did well. Waiting takes 2 to 9 % of the time.
LEARNT, STUCK, SOLVED, PULL, WAIT = 100, 0.98, 99.0, 30.0, 0.5


class Expectation:
    """What to expect of a training on so many images by so many workers; it says each hint once."""

    def __init__(self, config: Config, images: int, workers: int):
        self.config, self.images, self.workers = config, images, workers
        self.guess = math.log(config.moco_k + 1)  # the loss where all K + 1 keys are alike
        self.chance = 100 / (config.moco_k + 1)  # percent
        self.records: list[dict[str, float]] = []  # that are still to be judged
        self.said: set[str] = set()

    def lines(self) -> list[str]:
        """What is normal, for the log of a run that starts, and what of its options is not."""
        config, K = self.config, self.config.moco_k
        rises = f" while the learning rate rises (--warmup-epochs {config.warmup_epochs})" if config.warmup_epochs else ""
        said = [
            f"expected: contrastive loss near ln(K + 1) = {self.guess:.2f}, that of guessing among {K} negatives, once keys have "
            f"filled the queue ({math.ceil(K / config.batch_size)} steps; before, noise is told from a key with ease); it stays "
            f"there{rises or ' for some steps'}, then falls, and so does the gradient norm",
            f"expected: contrast accuracy {self.chance:.2g} % by chance; of a student that learns, several times that at the end "
            f"of {'its first epoch' if not rises else f'epoch {config.warmup_epochs}'}, and rising",
        ]
        if config.teacher:
            scaled = (
                f"it begins near {config.loss_share * self.guess:.2g}, --loss-share {config.loss_share:g} of ln(K + 1)"
                if config.loss_share
                else f"--loss-factor {config.loss_factor:g} divides it"
            )
            said.append(
                "expected: distillation loss below the contrastive one, or some times it on an epoch's average "
                f"(ratio under {PULL:.0f}); {scaled}"
            )
        if 4 * K > self.images:
            said.append(
                f"warning: the queue has {K} keys, more than a quarter of the {self.images} images, so that an image meets its "
                f"own old keys as negatives: --moco-k {max(1, self.images // 4)} or less is better"
            )
        return said

    def hints(self, records: list[dict[str, float]]) -> list[str]:
        """What is odd about an epoch's steps, given their records, and was not said before; a sentence each.

        The steps of too short an epoch are judged with those of the next.
        """
        self.records += records
        if len(self.records) < STEPS:
            return []
        names = ("steps", "epoch", "contrastive", "distillation", "accuracy", "data_wait")
        mean = {name: sum(record[name] for record in self.records) / len(self.records) for name in names}
        self.records = []
        found = {"stuck": self.stuck(mean), "solved": self.solved(mean), "pull": self.pull(mean), "wait": self.wait(mean)}
        new = {cause: hint for cause, hint in found.items() if hint and cause not in self.said}
        self.said |= new.keys()
        return list(new.values())

    def stuck(self, mean: dict[str, float]) -> str | None:
        """The loss is that of guessing where it should have fallen."""
        early = mean["steps"] < LEARNT or mean["epoch"] < max(1, self.config.warmup_epochs)
        if early or mean["contrastive"] < STUCK * self.guess:
            return None
        return (
            f"the contrastive loss, {mean['contrastive']:.2f}, is that of guessing, ln(K + 1) = {self.guess:.2f}: see whether "
            f"--lr {self.config.lr:g} is too high (0.03 is for a batch of 256; in proportion, {self.config.batch_size} have "
            f"{0.03 * self.config.batch_size / 256:.2g}) or 0, or the images are too much alike"
        )

    def solved(self, mean: dict[str, float]) -> str | None:
        """Keys are told apart with too much ease to learn from it."""
        if mean["accuracy"] < SOLVED or mean["contrastive"] > self.guess / 2:  # keys that are all one are found as well
            return None
        alone = (
            "one worker by itself has no other to shuffle batch norm with, through which a query knows its key: use more "
            "workers, or --accumulate 2"
        )
        shortcut = (
            f"see whether views share what tells them apart at once, such as a frame, a stamp or a colour (--aug-plus, a lower "
            f"--crop-min than {self.config.crop_min:g}), or --moco-k {self.config.moco_k} is too few negatives"
        )
        cause = alone if self.workers * self.config.accumulate == 1 else shortcut
        return f"contrast accuracy {mean['accuracy']:.1f} %: the task is too easy to learn from; {cause}"

    def pull(self, mean: dict[str, float]) -> str | None:
        """The distillation decides alone."""
        ratio = mean["distillation"] / max(mean["contrastive"], 1e-9)
        if ratio < PULL:
            return None
        factor, share = self.config.loss_factor, self.config.loss_share
        equal = f"--loss-share {share / ratio:.2g}" if share else f"--loss-factor {factor * ratio:.2g}"
        return (
            f"the distillation loss is {ratio:.3g} times the contrastive one, of which the student then learns little: "
            f"{equal} would make them equal (now {share or factor:g})"
        )

    def wait(self, mean: dict[str, float]) -> str | None:
        """Images come too slowly."""
        if mean["data_wait"] < WAIT:
            return None
        return (
            f"{100 * mean['data_wait']:.0f} % of the time goes into waiting for images: more --workers (now "
            f"{self.config.workers} a worker), packed data (python -m job.pack), or --augment-on device on GPUs may help"
        )
