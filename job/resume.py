"""Resume a training run: find its checkpoint, check the options, restore the state."""

import dataclasses
from collections.abc import Iterable

from torch import nn

from job.checkpoints.folder import AUTO, restarts
from job.checkpoints.foreign import is_moco
from job.config import OF_TEACHER, WITHOUT_EFFECT, Config, without_head
from job.declare import flag
from job.distill import DISTILLERS, Distiller
from job.distill.momentum import MOMENTUM
from job.distill.similarity import SETTINGS
from job.engine import statistics
from job.engine.resume import (
    FINAL,
    check_folder,
    check_format,
    load_named,
    load_optimizer,
    log_changes,
    log_workers,
    newest,
    resumed_before,
    warn_of_rate,
)
from job.engine.run import Run
from job.errors import RunError
from job.frameworks import FRAMEWORKS
from job.networks import demands_size
from job.position import Position, steps_of
from job.schedules import distillation_strength
from job.training import Training

# Keys that distinguish a run's checkpoint from a classifier's, in addition to its format.
SAVED = ("epoch", "state_dict", "optimizer", "step", "mgd", "config", "workers", "images", "order")
# Options that determine the shapes of saved tensors.
SHAPES = ("framework", "arch", "stem", "width", "zero_init_residual")


def find(config: Config, run: Run) -> tuple[Config, dict | None]:
    """Return the options and the checkpoint that --resume names, or None.

    A teacher's file there, as in the original program, becomes --teacher.
    RunError: the checkpoint is incomplete, or the options do not continue its run.
    """
    if not config.resume:
        return config, None
    if config.resume == AUTO or resumed_before(config, run):
        saved = newest(run)
        return config, saved and continues(saved, config, run)
    saved = load_named(config, run)
    if is_moco(saved) and ("format" not in saved or saved.get("arch") != config.arch):
        if config.teacher:
            raise RunError(
                f"--resume {config.resume}: a teacher's file, and --teacher names another. "
                "Leave out one"
            )
        run.log.line(
            f"--resume {config.resume}: a checkpoint of {saved.get('arch', 'MoCo')}, not a run of "
            f"{config.arch}; it is used as --teacher"
        )
        config = dataclasses.replace(config, teacher=config.resume, resume="")
        saved = newest(run) if restarts() else None
        return config, saved and continues(saved, config, run)
    run.on_first(lambda: check_folder(config, run))
    if "format" not in saved:
        raise RunError(
            f"--resume {config.resume}: has no format; expected a checkpoint of job.train. "
            "To distil from its network, give it to --teacher"
        )
    run.log.line(f"resuming from {config.resume}")
    return config, continues(saved, config, run)


def continues(saved: dict, config: Config, run: Run) -> dict:
    """Return `saved` and log changed options. RunError: the options do not continue its run."""
    if missing := [name for name in SAVED if name not in saved]:
        raise RunError(
            f"--resume {config.resume}: has no {missing[0]!r}; expected a checkpoint of job.train"
        )
    check_format(saved)
    old = as_given(saved["config"], config)
    where = f"the checkpoint of epoch {saved['epoch']}, step {saved['step']}"
    check_same(SHAPES, old, config, where)
    distils = bool(old.get("teacher"))
    if distils != bool(config.teacher):
        has = "distils from a teacher" if distils else "has no teacher"
        fix = "Add --teacher" if distils else "Leave out --teacher, or start a new run"
        raise RunError(f"{where} {has}. {fix}")
    check_same(fixed(config, within_epoch=bool(saved["step"])), old, config, where)
    if distils and config.loss_share and not old["loss_share"]:
        raise RunError(
            f"--loss-share {config.loss_share:g}: {where} has --loss-factor {old['loss_factor']}, "
            "and the factor of a share is computed at a run's start. "
            f"Give --loss-factor {old['loss_factor']}, or start a new run"
        )
    without_effect = WITHOUT_EFFECT | without_head(config).keys()
    without_effect |= set() if config.teacher else OF_TEACHER
    log_changes(old, config, where, run, without_effect)
    warn_of_rate(saved, config, run)
    warn_of_ramp(saved, config, run)
    averaged = "; batch norm starts from the average of their statistics" if saved["step"] else ""
    log_workers(saved, where, run, averaged)
    return saved


def as_given(old: dict, config: Config) -> dict:
    """Return the options `old`, with config's notation of equal values of similarity.

    0 means the published value of --similarity. Earlier presets have the value itself.
    """
    if old.get("similarity") != config.similarity:
        return old
    same = {}
    for key, published in SETTINGS[config.similarity]._asdict().items():
        name = f"similarity_{key}"
        now = getattr(config, name)
        if (old.get(name) or published) == (now or published):
            same[name] = now
    return old | same


def check_same(names: Iterable[str], old: dict, config: Config, where: str) -> None:
    """RunError: an option of `names` differs from the checkpoint's `old` ones.

    Options that the checkpoint's version did not have count as their defaults.
    """
    for name in names:
        has, now = old.get(name, getattr(Config(), name)), getattr(config, name)
        if has != now:
            raise RunError(f"{flag(name)} {now}: {where} has {has}; expected the same")


def fixed(config: Config, within_epoch: bool) -> list[str]:
    """Return the options that determine saved tensors, or the rest of an incomplete epoch."""
    names = [*SHAPES, *FRAMEWORKS[config.framework].shapes]
    for name in config.distill if config.teacher else []:
        names += DISTILLERS[name].shapes
    unused = without_head(config)  # shapes no tensor
    names = [name for name in names if name not in unused]
    names += ["image_size"] * demands_size(config.arch)
    names += ["distill", "teacher_size"] if config.teacher else []
    return names + ["seed", "batch_size"] * within_epoch


def warn_of_ramp(saved: dict, config: Config, run: Run) -> None:
    """Warn if changed options make the weight of the distillation loss jump at the resume."""
    position, steps = Position(saved["epoch"], saved["step"]), steps_of(saved)

    def weight(ramp: bool, epochs: int) -> float:
        return distillation_strength(*position, epochs, steps) if ramp else 1.0

    before = weight(saved["config"].get("loss_ramp", False), saved["config"]["epochs"])
    now = weight(config.loss_ramp, config.epochs)
    if config.teacher and position.epoch < config.epochs and before != now:
        run.log.remark(
            "warning",
            "ramp_jump",
            f"the weight of the distillation loss jumps from {before:.4g} to {now:.4g}, "
            f"because of the changed --loss-ramp or --epochs; {FINAL}",
        )


def restore(saved: dict, training: Training) -> Position:
    """Load a checkpoint into a run. Return the position to resume at.

    RunError: the teacher or the margins differ, or within an epoch the images.
    """
    position = Position(saved["epoch"], saved["step"])
    if position.step and saved["images"] != len(training.images):
        raise RunError(
            f"{training.images.root} has {len(training.images)} images; expected "
            f"{saved['images']}, as the checkpoint is from within an epoch. "
            "Resume from one of an epoch's end"
        )
    if position.step and saved["order"] != training.order(position.epoch):
        raise RunError(
            f"{training.images.root} has other images or another order, as after packing; expected "
            "the same, as the checkpoint is from within an epoch. Resume from an epoch's end, "
            "or restore the images"
        )
    check_teacher(saved, training)
    state = {key.removeprefix("module."): value for key, value in saved["state_dict"].items()}
    load_module(training.framework.module, state, saved, training.config)
    for distiller in training.distillation.distillers:
        restore_distiller(distiller, saved, training.run)
    if encoder := training.distillation.momentum:
        load_module(encoder.module, saved[MOMENTUM], saved, training.config)
    load_optimizer(training.optimizer, saved["optimizer"], training.config)
    if saved.get("statistics") is not None and saved["workers"] == training.run.size:
        statistics.load(training.trained, saved["statistics"][training.run.rank])
    training.run.bad_images.update(saved.get("bad_images", ()))
    return position


def load_module(module: nn.Module, state: dict, saved: dict, config: Config) -> None:
    """Load the tensors `state` of the checkpoint `saved` into a module.

    RunError: they do not fit it, because the code of a user's network, or timm, has changed.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        where = f"--resume {config.resume}: epoch {saved['epoch']}, step {saved['step']}"
        misfit = first_misfit(state, module.state_dict()) or str(error).splitlines()[-1].strip()
        raise RunError(
            f"{where} does not fit the network {config.arch}: {misfit}. "
            "Restore the network's code, or start a new run with another --out"
        ) from None


def first_misfit(state: dict, expected: dict) -> str:
    """Return the first tensor that differs from the expected ones, with the difference."""
    shapes = [
        {name: tuple(getattr(value, "shape", ())) for name, value in each.items()}
        for each in (state, expected)
    ]
    saved, now = shapes
    both = [name for name in now if name in saved and saved[name] != now[name]]
    misfits = [f"{name} is {saved[name]}, expected {now[name]}" for name in both]
    misfits += [f"{name} is missing" for name in now if name not in saved]
    misfits += [f"{name} is unexpected" for name in saved if name not in now]
    return next(iter(misfits), "")


def check_teacher(saved: dict, training: Training) -> None:
    """RunError: --teacher has other weights or features than the teacher of the checkpoint."""
    config, now = training.config, training.distillation.digest
    before = saved.get("teacher") or now  # older checkpoints have no digest
    if before != now:
        raise RunError(
            f"--teacher {config.teacher}: content of SHA-256 {now}; expected {before}, the teacher "
            f"{saved['config']['teacher']} of the checkpoint. Give that teacher, or start a new run"
        )


def restore_distiller(distiller: Distiller, saved: dict, run: Run) -> None:
    """Load a distiller's state from a checkpoint. RunError: the teacher or the options differ."""
    state, name = saved[distiller.name], distiller.name
    distiller.check(state)
    try:
        distiller.module.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(
            f"the checkpoint's state of {name} does not fit this teacher and the options of "
            f"{name}: {str(error).splitlines()[-1].strip()}"
        ) from None
    distiller.factor.fill_(factor(distiller, saved, run))


def factor(distiller: Distiller, saved: dict, run: Run) -> float:
    """Return the loss factor of a resumed run, and log a change.

    It is --loss-factor, or with --loss-share the saved factor, scaled by the changes of
    --loss-share and --distill-weights.
    """
    config, old = distiller.config, saved[distiller.name]["factor"].item()
    new = config.loss_factor
    if config.loss_share:
        before, now = saved["config"], dataclasses.asdict(config)
        new = old * (before["loss_share"] / config.loss_share)
        new *= total_weight(now) / total_weight(before)
    if new != old:
        run.log.line(f"{distiller.name}: loss factor {new:.6g}; in the checkpoint {old:.6g}")
    return new


def total_weight(options: dict) -> float:
    """Return the sum of the distillers' weights. Before --distill there was one distiller."""
    return sum(options.get("distill_weights") or [1.0 for _ in options.get("distill", ["mgd"])])
