"""How a training run resumes: its checkpoint, how its options may differ, and what is restored."""

import dataclasses
from collections.abc import Iterable

from torch import nn

from job.checkpoints.folder import AUTO, load, restarts
from job.checkpoints.foreign import is_moco
from job.config import OF_TEACHER, WITHOUT_EFFECT, Config, without_head
from job.declare import flag
from job.distill import DISTILLERS, Distiller
from job.distill.momentum import MOMENTUM
from job.distill.similarity import SETTINGS
from job.engine import statistics
from job.engine.resume import (
    FINAL,
    check_format,
    check_place,
    load_optimizer,
    newest,
    resumed_before,
    tell_changes,
    warn_of_rate,
)
from job.engine.run import Run
from job.errors import RunError
from job.frameworks import FRAMEWORKS
from job.networks import demands_size
from job.position import Position, steps_of
from job.schedules import pull
from job.training import Training

# What a run saves beside its format, and a classifier does not all.
SAVED = ("epoch", "state_dict", "optimizer", "step", "mgd", "config", "workers", "images", "order")
SHAPES = (
    "framework",
    "arch",
    "stem",
    "width",
    "zero_init_residual",
)  # these options shape the saved tensors


def find(config: Config, run: Run) -> tuple[Config, dict | None]:
    """Return the options and the checkpoint that --resume names, or None.

    A teacher given there (the original's way) becomes --teacher. RunError: the checkpoint is incomplete, or the options do not
    continue its run.
    """
    if not config.resume:
        return config, None
    if config.resume == AUTO or resumed_before(config, run):
        saved = newest(run)
        return config, saved and continues(saved, config, run)
    saved = run.on_first(lambda: load(config.resume))
    if is_moco(saved) and ("format" not in saved or saved.get("arch") != config.arch):
        if config.teacher:
            raise RunError(
                f"--resume {config.resume} is a teacher's file, and --teacher names another: leave out one of them"
            )
        run.log.line(
            f"--resume {config.resume} is a {saved.get('arch', 'MoCo')} checkpoint, no run of {config.arch}: taken as --teacher"
        )
        config = dataclasses.replace(config, teacher=config.resume, resume="")
        saved = newest(run) if restarts() else None
        return config, saved and continues(saved, config, run)
    run.on_first(lambda: check_place(config, run))
    if "format" not in saved:
        raise RunError(
            f"--resume {config.resume}: not a run's checkpoint, which has a format; expected one of job.train. "
            "To distil from the network in it, give it to --teacher"
        )
    run.log.line(f"resuming from {config.resume}")
    return config, continues(saved, config, run)


def continues(saved: dict, config: Config, run: Run) -> dict:
    """Return `saved` if the options continue its run; say what they change. RunError: if they cannot."""
    if lacking := [name for name in SAVED if name not in saved]:
        raise RunError(
            f"the checkpoint of --resume {config.resume} is none of job.train: it has no {lacking[0]!r}"
        )
    check_format(saved)
    old = as_given(saved["config"], config)
    where = f"the checkpoint of epoch {saved['epoch']}, step {saved['step']}"
    check_same(SHAPES, old, config, where)
    distils = bool(old.get("teacher"))
    if distils != bool(config.teacher):
        has = "distils from a teacher" if distils else "has no teacher"
        raise RunError(
            f"{where} {has}: "
            + ("give --teacher" if distils else "leave out --teacher, or start a new run")
        )
    check_same(fixed(config, within_epoch=bool(saved["step"])), old, config, where)
    if distils and config.loss_share and not old["loss_share"]:
        raise RunError(
            f"--loss-share {config.loss_share:g}: {where} has a --loss-factor of {old['loss_factor']}, and a share is measured "
            f"at a run's start: give --loss-factor {old['loss_factor']}, or start a new run"
        )
    without_effect = WITHOUT_EFFECT | without_head(config).keys()
    without_effect |= set() if config.teacher else OF_TEACHER
    tell_changes(old, config, where, run, without_effect)
    warn_of_rate(saved, config, run)
    warn_of_ramp(saved, config, run)
    if saved["workers"] != run.size:
        own = "; batch norm starts from the average of their statistics" if saved["step"] else ""
        run.log.line(f"{where} was saved by {saved['workers']} workers; now {run.size}{own}")
    return saved


def as_given(old: dict, config: Config) -> dict:
    """Return the options `old`, in which values of similarity that mean the same are config's.

    0 is the published value of --similarity. Presets of earlier versions give the value itself.
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
    """RunError: an option of `names` differs from a checkpoint's `old` ones. Those of a newer version had their defaults."""
    for name in names:
        has, now = old.get(name, getattr(Config(), name)), getattr(config, name)
        if has != now:
            raise RunError(
                f"{flag(name)} {now}: {where} has {has}, and cannot be continued with another"
            )


def fixed(config: Config, within_epoch: bool) -> list[str]:
    """Return the options that a resume cannot change: they shape the saved tensors, or the rest of a begun epoch."""
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
        return pull(*position, epochs, steps) if ramp else 1.0

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
    """Load a checkpoint into a run's parts; return the position to resume at.

    RunError: it was taken of other images in the middle of an epoch, or with another teacher or other margins.
    """
    position = Position(saved["epoch"], saved["step"])
    if position.step and saved["images"] != len(training.images):
        raise RunError(
            f"the checkpoint was taken within an epoch of {saved['images']} images; now there are {len(training.images)}: "
            "resume from one of an epoch's end"
        )
    if position.step and saved["order"] != training.order(position.epoch):
        raise RunError(
            f"the checkpoint was taken within an epoch of other images than {training.images.root} now has, or of another order, "
            "as packing gives them: resume from one of an epoch's end, or with the images as they were"
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
        where = f"--resume {config.resume}: the checkpoint of epoch {saved['epoch']}, step {saved['step']}"
        misfit = first_misfit(state, module.state_dict()) or str(error).splitlines()[-1].strip()
        raise RunError(
            f"{where} does not fit the network {config.arch}: {misfit}. "
            "Restore the network's code, or start a new run with another --out"
        ) from None


def first_misfit(state: dict, expected: dict) -> str:
    """Return the first tensor of `state` that has no place among the expected ones, and why."""
    shapes = [
        {name: tuple(getattr(value, "shape", ())) for name, value in each.items()}
        for each in (state, expected)
    ]
    saved, now = shapes
    both = [name for name in now if name in saved and saved[name] != now[name]]
    misfits = [f"{name} is {saved[name]}, expected {now[name]}" for name in both]
    misfits += [f"{name} is missing" for name in now if name not in saved]
    misfits += [f"{name} has no place" for name in saved if name not in now]
    return next(iter(misfits), "")


def check_teacher(saved: dict, training: Training) -> None:
    """RunError: --teacher has other weights than the teacher of the checkpoint."""
    config, now = training.config, training.distillation.digest
    before = saved.get("teacher") or now  # older checkpoints have no digest
    if before != now:
        raise RunError(
            f"--teacher {config.teacher}: weights of SHA-256 {now}; expected {before}, those of {saved['config']['teacher']}, "
            "with which the checkpoint was trained. Give that teacher, or start a new run"
        )


def restore_distiller(distiller: Distiller, saved: dict, run: Run) -> None:
    """Load a distiller's state from a checkpoint. RunError: it does not fit the teacher or the options."""
    state, name = saved[distiller.name], distiller.name
    distiller.check(state)
    try:
        distiller.module.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(
            f"the checkpoint's {name} state does not fit this teacher and the options of {name}: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None
    distiller.factor.fill_(factor(distiller, saved, run))


def factor(distiller: Distiller, saved: dict, run: Run) -> float:
    """Return the loss factor of a resumed run, and log a change.

    It is --loss-factor, or with --loss-share the saved one in proportion to the shares and weights.
    """
    config, old = distiller.config, saved[distiller.name]["factor"].item()
    new = config.loss_factor
    if config.loss_share:
        before, now = saved["config"], dataclasses.asdict(config)
        new = old * (before["loss_share"] / config.loss_share)
        new *= total_weight(now) / total_weight(before)
    if new != old:
        run.log.line(f"{distiller.name}: loss factor {new:.6g}; it was {old:.6g} in the checkpoint")
    return new


def total_weight(options: dict) -> float:
    """Return the sum of the distillers' weights. Before --distill there was one distiller."""
    return sum(options.get("distill_weights") or [1.0 for _ in options.get("distill", ["mgd"])])
