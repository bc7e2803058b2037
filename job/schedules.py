"""Schedules: learning rate, weight of the distillation loss, matching, checkpoints."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from job.declare import option
from job.errors import RunError

# Epochs of 200 at which the matching is solved: more at the start, when channels still change.
LOG_REFRESH = (0, 1, 2, 3, 6, 9, 15, 26, 43, 74, 126)


@dataclass(frozen=True)
class RateOptions:
    """Learning rate."""

    group = "rate"

    epochs: int = option(200, "epochs to train", at_least=1, at_most=10**6)
    lr: float = option(0.03, "learning rate", "--learning-rate", at_least=0.0)
    schedule: list[int] = option(
        [120, 160], "epochs at which the learning rate falls tenfold", at_least=0, many=True
    )
    cos: bool = option(False, "cosine learning rate, instead of --schedule")
    warmup_epochs: int = option(3, "epochs over which the learning rate rises", at_least=0)


def learning_rate(config: RateOptions, epoch: int) -> float:
    """Return the learning rate of an epoch e of E, counted from 0.

    In W warm-up epochs it is lr (0.001 (1 - e / W) + e / W). After them, it is
    lr 0.5 (1 + cos(pi e / E)) (arXiv 1608.03983, eq. 5, without restarts), or lr times 0.1 for each
    epoch of the schedule up to e.
    """
    if epoch < config.warmup_epochs:
        risen = epoch / config.warmup_epochs
        return config.lr * (0.001 * (1 - risen) + risen)
    if config.cos:
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.lr * 0.1 ** sum(epoch >= drop for drop in config.schedule)


def distillation_strength(epoch: int, step: int, epochs: int, steps: int) -> float:
    """Return the strength of the distillation at a step of an epoch, both from 0.

    It falls linearly from 1 to 0 at the end of the run, after `epochs` of `steps` each.
    """
    return 1 - (epoch + step / steps) / epochs


def parse_refresh(text: str, shown: str = "refresh epochs") -> Callable[[int], bool]:
    """Return a function epoch -> whether the matching is solved at its start.

    text: log, never, every:N or epochs such as 0,5,10. shown: the option, for the error.
    RunError: another text.
    """
    if text == "log":
        return lambda epoch: epoch in LOG_REFRESH
    if text == "never":
        return lambda epoch: False
    if match := re.fullmatch(r"every:([1-9]\d{0,8})", text):
        period = int(match[1])
        return lambda epoch: epoch % period == 0
    if re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        chosen = {int(number) for number in text.split(",")}
        return lambda epoch: epoch in chosen
    raise RunError(f"{shown} {text!r}: expected log, never, every:N, or epochs such as 0,5,10")


def parse_save_every(text: str, shown: str = "save every") -> Callable[[int, int, int], bool]:
    """Return a function (epoch, step, steps) -> whether to save.

    epoch, step: the epochs done, and the steps done in the next one. steps: all steps done.
    text: a number of epochs, or of steps as in 500steps. shown: the option, for the error.
    RunError: another text.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})(steps)?", text)
    if not match:
        raise RunError(
            f"{shown} {text!r}: expected a number of epochs such as 1, or of steps such as 500steps"
        )
    period = int(match[1])
    if match[2]:
        return lambda epoch, step, steps: steps % period == 0
    return lambda epoch, step, steps: step == 0 and epoch % period == 0
