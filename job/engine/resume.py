"""Resume any run: its checkpoint, options that can differ, and values that must be finite."""

import dataclasses
import math
import os
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import torch

from job.checkpoints.folder import FORMAT, load
from job.cluster import comm
from job.engine.run import Run
from job.errors import RunError, of_option
from job.options import Common
from job.position import Position
from job.schedules import RateOptions, learning_rate

SAME = 1e-3  # relative difference of learning rates; a larger one is a jump
FINAL = "a run that starts with its final --epochs has no jump"


def resumed_before(config: Common, run: Run) -> bool:
    """Return whether a requeued job has already resumed from --resume PATH. A collective.

    Then it must not go back there again.
    """
    before = run.on_first(lambda: run.checkpoints.resumed_before(config.resume))
    if before:
        run.log.line(
            f"an earlier try of this job has resumed from {config.resume}, so this one resumes "
            "from its newest checkpoint"
        )
    return before


def newest(run: Run) -> dict | None:
    """Return the newest complete checkpoint of the run's folder, or None, and log it. A collective.

    RunError, on all workers: no checkpoint can be loaded.
    """
    saved = run.on_first(lambda: run.checkpoints.newest(run.log.line))
    if saved is None:
        run.log.line(f"no checkpoint in {run.folder} yet: starting from the first epoch")
    return saved


def load_named(config: Common, run: Run) -> dict:
    """Return the content of the checkpoint file that --resume names. A collective.

    RunError, on all workers: it is not a complete checkpoint.
    """
    with of_option("--resume", config.resume):
        return run.on_first(lambda: load(config.resume))


def check_folder(config: Common, run: Run) -> None:
    """RunError: the run's folder has checkpoints, and --resume's is in another folder."""
    source = os.path.dirname(os.path.realpath(config.resume))
    # In a container, one folder can have two names without a link between them.
    if run.checkpoints.paths() and not os.path.samefile(source, run.folder):
        raise RunError(
            f"{run.folder} has another run than --resume {config.resume}: choose another --out"
        )


def check_format(saved: dict) -> None:
    """RunError: a checkpoint has the format of another version."""
    if saved["format"] != FORMAT:
        raise RunError(
            f"the checkpoint has format {saved['format']}; expected {FORMAT}. Resume with the "
            "version that saved it"
        )


def log_changes(
    old: dict, config: Common, where: str, run: Run, without_effect: AbstractSet[str]
) -> None:
    """Log the options that differ from a checkpoint's.

    old: the checkpoint's options. An option that it lacks is newer, and had its default.
    where: names the checkpoint. without_effect: options that are not compared.
    """
    old, new = dataclasses.asdict(type(config)()) | old, dataclasses.asdict(config)
    for name in sorted(new.keys() - without_effect):
        if old[name] != new[name]:
            run.log.line(f"--{name.replace('_', '-')} was {old[name]} in {where}; now {new[name]}")


def log_workers(saved: dict, where: str, run: Run, effect: str = "") -> None:
    """Log a number of workers that differs from a checkpoint's.

    where: names the checkpoint. effect: of the difference, for the end of the line.
    """
    if saved["workers"] != run.size:
        run.log.line(f"{where} was saved by {saved['workers']} workers; now {run.size}{effect}")


def warn_of_rate(saved: dict, config: Common, run: Run) -> None:
    """Warn if changed options make the learning rate jump, with a --lr that avoids it."""
    epoch, names = saved["epoch"], [f.name for f in dataclasses.fields(RateOptions)]
    if epoch >= config.epochs:
        return
    values = dataclasses.asdict(type(config)()) | saved["config"]
    old = RateOptions(**{name: values[name] for name in names})
    last = epoch if saved["step"] else max(0, epoch - 1)
    before, planned, now = (
        learning_rate(old, last),
        learning_rate(old, epoch),
        learning_rate(config, epoch),
    )
    if any(math.isclose(now, rate, rel_tol=SAME) for rate in (before, planned)):
        return
    differ = [
        name
        for name in names
        if getattr(old, name) != getattr(config, name) and not (name == "schedule" and config.cos)
    ]
    changed = " and ".join(f"--{name.replace('_', '-')}" for name in differ)
    smooth = planned or before  # 0 is planned after the last epoch of --cos
    advice = f"; --lr {config.lr * smooth / now:.4g} continues at {smooth:.4g}" if now else ""
    advice += f"; {FINAL}" if config.cos and old.epochs != config.epochs else ""
    run.log.remark(
        "warning",
        "rate_jump",
        f"the learning rate jumps from {before:.4g} in epoch {last} to {now:.4g} in epoch {epoch}, "
        f"because of the changed {changed}{advice}",
    )


def check_finite(parameters: Iterable[torch.Tensor], epoch: int, step: int) -> None:
    """RunError: parameters are not finite, so they must not be saved.

    The parameters are the same on all workers, so all raise it.
    """
    finite = torch.stack(torch._foreach_norm(list(parameters))).isfinite().all()
    if not comm.to_host(finite, "parameters"):
        raise RunError(
            f"the parameters are not finite after epoch {epoch}, step {step}, and are not saved; "
            "earlier checkpoints are untouched. A lower --lr may help",
            code=1,
        )


def nothing_to_do(start: Position, epochs: int, steps: int) -> str:
    """Return the last log line of a run whose checkpoint is beyond --epochs.

    start: the checkpoint's position. steps: of an epoch.
    """
    more = f" and {start.step} of {steps} steps" if start.step else ""
    return (
        f"nothing to do, and nothing changed: {start.epoch} epochs{more} are done; "
        f"--epochs is {epochs}"
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, config: Common) -> None:
    """Load an optimizer's momenta. Its settings are those of the options, not the saved ones.

    RunError: the momenta do not fit the trained parameters.
    """
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise RunError(
            f"--resume {config.resume}: the checkpoint does not fit the trained parameters: "
            f"{error}. Freeze the same parameters as before, or start a new run with another --out"
        ) from None
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            like = torch.is_tensor(value) and value.shape == parameter.shape
            if like and value.stride() != parameter.stride():  # the update needs equal strides
                state[name] = torch.empty_like(parameter).copy_(value)
    for group in optimizer.param_groups:
        group.update(momentum=config.momentum, weight_decay=config.weight_decay)
