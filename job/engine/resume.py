"""From a run to its checkpoint and back: what is saved, how a run goes on from it, and what may differ."""

import dataclasses
import math
import os
from collections.abc import Iterable
from types import SimpleNamespace

import torch

from job.checkpoints.folder import AUTO, FORMAT, load, restarts
from job.checkpoints.foreign import is_moco
from job.config import OF_TEACHER, WITHOUT_EFFECT, Config, LinearConfig
from job.engine import replicas, statistics
from job.engine.position import steps_of
from job.engine.run import Run
from job.engine.state import Training
from job.errors import RunError
from job.schedules import Rates, learning_rate, pull

# What a run saves beside its format, and a classifier does not all.
SAVED = ("epoch", "state_dict", "optimizer", "step", "mgd", "config", "workers", "images", "order")
# What shapes the saved tensors, or says whence they come; a checkpoint with others belongs to another run.
SHAPES = ("arch", "stem", "width", "zero_init_residual", "mlp", "moco_dim", "moco_k", "mgd_stages", "matching")
SAME = 1e-3  # largest relative difference of learning rates that is no jump
FINAL = "a run that starts with its final --epochs has no jump"


def find(config: Config, run: Run) -> dict | None:
    """Return the checkpoint that --resume names, or None. A teacher given there (the original's way) becomes --teacher.

    RunError: no whole checkpoint, or one of a run that the options do not continue.
    """
    if not config.resume:
        return None
    if config.resume == AUTO or resumed_before(config, run):
        saved = newest(run)
        return saved and continues(saved, config, run)
    saved = run.on_first(lambda: load(config.resume))
    if is_moco(saved) and ("format" not in saved or saved.get("arch") != config.arch):
        if config.teacher:
            raise RunError(f"--resume {config.resume} is a teacher's file, and --teacher names another: leave out one of them")
        run.log.line(
            f"--resume {config.resume} is a {saved.get('arch', 'MoCo')} checkpoint, no run of {config.arch}: taken as --teacher"
        )
        config.teacher, config.resume = config.resume, ""
        saved = newest(run) if restarts() else None
        return saved and continues(saved, config, run)
    run.on_first(lambda: check_place(config, run))
    if "format" not in saved:
        raise RunError(f"--resume {config.resume} is no checkpoint of a run; its first name is {next(iter(saved), 'none')!r}")
    run.log.line(f"resuming from {config.resume}")
    return continues(saved, config, run)


def resumed_before(config: Config | LinearConfig, run: Run) -> bool:
    """Whether a requeued job has resumed from --resume PATH in an earlier try, and must not go back there again."""
    before = run.on_first(lambda: run.checkpoints.resumed_before(config.resume))
    if before:
        run.log.line(f"an earlier try of this job has resumed from {config.resume}: this one resumes from its newest checkpoint")
    return before


def newest(run: Run) -> dict | None:
    """Return the newest whole checkpoint of the run's folder, or None, and say so. RunError: none is whole."""
    saved = run.on_first(lambda: run.checkpoints.newest(run.log.line))
    if saved is None:
        run.log.line(f"no checkpoint in {run.folder} yet: starting from the first epoch")
    return saved


def check_place(config: Config | LinearConfig, run: Run) -> None:
    """RunError: the run's folder has checkpoints of another run than --resume's."""
    source = os.path.dirname(os.path.realpath(config.resume))
    # In a container, one folder can have two names without a link between them.
    if run.checkpoints.paths() and not os.path.samefile(source, run.folder):
        raise RunError(f"{run.folder} holds another run than --resume {config.resume}: choose another --out")


def continues(saved: dict, config: Config, run: Run) -> dict:
    """Return `saved` if the options continue its run; say what they change. RunError: if they cannot."""
    if lacking := [name for name in SAVED if name not in saved]:
        raise RunError(f"the checkpoint of --resume {config.resume} is none of job.train: it has no {lacking[0]!r}")
    check_format(saved)
    old, new = saved["config"], dataclasses.asdict(config)
    where = f"the checkpoint of epoch {saved['epoch']}, step {saved['step']}"
    if bool(saved["mgd"]) != bool(config.teacher):
        has = "distils from a teacher" if saved["mgd"] else "has no teacher"
        raise RunError(f"{where} {has}: " + ("give --teacher" if saved["mgd"] else "leave out --teacher, or start a new run"))
    names = [name for name in SHAPES if saved["mgd"] or name not in OF_TEACHER] + ["seed", "batch_size"] * bool(saved["step"])
    for name in names:
        has = old.get(name, Config.__dataclass_fields__[name].default)  # of a checkpoint from before there was the option
        if has != new[name]:
            raise RunError(f"--{name.replace('_', '-')} {new[name]}: {where} has {has}, and cannot be continued with another")
    if saved["mgd"] and config.loss_share and not old["loss_share"]:
        raise RunError(
            f"--loss-share {config.loss_share:g}: {where} has a --loss-factor of {old['loss_factor']}, and a share is measured "
            f"at a run's start: give --loss-factor {old['loss_factor']}, or start a new run"
        )
    tell_changes(old, config, where, run)
    warn_of_rate(saved, config, run)
    warn_of_ramp(saved, config, run)
    if saved["workers"] != run.size:
        own = "; batch norm starts from the average of their statistics" if saved["step"] else ""
        run.log.line(f"{where} was saved by {saved['workers']} workers; now {run.size}{own}")
    return saved


def check_format(saved: dict) -> None:
    """RunError: a checkpoint is of another version's format."""
    if saved["format"] != FORMAT:
        raise RunError(
            f"the checkpoint has format {saved['format']}, this version reads {FORMAT}: go on with the version that saved it"
        )


def tell_changes(old: dict, config: Config | LinearConfig, where: str, run: Run) -> None:
    """Log the options that differ from a checkpoint's, and matter; of newer options it had the defaults."""
    old, new = dataclasses.asdict(type(config)()) | old, dataclasses.asdict(config)
    without_effect = WITHOUT_EFFECT if new.get("teacher") else WITHOUT_EFFECT | OF_TEACHER
    for name in sorted(new.keys() - without_effect):
        if old[name] != new[name]:
            run.log.line(f"--{name.replace('_', '-')} was {old[name]} in {where}; now {new[name]}")


def warn_of_rate(saved: dict, config: Config | LinearConfig, run: Run) -> None:
    """Warn if changed options make the learning rate jump at the resume, and how to avoid it."""
    epoch, names = saved["epoch"], Rates.__annotations__
    if epoch >= config.epochs:
        return
    old = SimpleNamespace(**dataclasses.asdict(type(config)()) | saved["config"])
    last = epoch if saved["step"] else max(0, epoch - 1)
    before, planned, now = learning_rate(old, last), learning_rate(old, epoch), learning_rate(config, epoch)
    if any(math.isclose(now, rate, rel_tol=SAME) for rate in (before, planned)):
        return
    differ = [name for name in names if getattr(old, name) != getattr(config, name) and not (name == "schedule" and config.cos)]
    changed = " and ".join(f"--{name.replace('_', '-')}" for name in differ)
    smooth = planned or before  # 0 is planned after the last epoch of --cos
    advice = f"; --lr {config.lr * smooth / now:.4g} continues at {smooth:.4g}" if now else ""
    advice += f"; {FINAL}" if config.cos and old.epochs != config.epochs else ""
    run.log.line(
        f"warning: the learning rate jumps from {before:.4g} in epoch {last} to {now:.4g} in epoch {epoch}, "
        f"because of the changed {changed}{advice}"
    )


def warn_of_ramp(saved: dict, config: Config, run: Run) -> None:
    """Warn if changed options make the weight of the distillation loss jump at the resume."""
    place, steps = (saved["epoch"], saved["step"]), steps_of(saved)

    def weight(ramp: bool, epochs: int) -> float:
        return pull(*place, epochs, steps) if ramp else 1.0

    before = weight(saved["config"].get("loss_ramp", False), saved["config"]["epochs"])
    now = weight(config.loss_ramp, config.epochs)
    if config.teacher and place[0] < config.epochs and before != now:
        run.log.line(
            f"warning: the weight of the distillation loss jumps from {before:.4g} to {now:.4g}, "
            f"because of the changed --loss-ramp or --epochs; {FINAL}"
        )


def check_finite(parameters: Iterable[torch.Tensor], epoch: int, step: int) -> None:
    """RunError, on all workers: the parameters, which are the same on each, are not finite and must not be saved."""
    if not torch.stack(torch._foreach_norm(list(parameters))).isfinite().all():
        raise RunError(
            f"the parameters are not finite after epoch {epoch}, step {step}, and are not saved; the checkpoints "
            "before are untouched. A lower --lr may help",
            code=1,
        )


def restore(saved: dict, training: Training) -> tuple[int, int]:
    """Load a checkpoint into a run's parts; return the (epoch, step) to go on from.

    RunError: it was taken of other images in the middle of an epoch, or with another teacher or other margins.
    """
    if saved["step"] and saved["images"] != len(training.images):
        raise RunError(
            f"the checkpoint was taken within an epoch of {saved['images']} images; now there are {len(training.images)}: "
            "resume from one of an epoch's end"
        )
    if saved["step"] and saved["order"] != training.order(saved["epoch"]):
        raise RunError(
            f"the checkpoint was taken within an epoch of other images than {training.images.root} now has, or of another order, "
            "as packing gives them: resume from one of an epoch's end, or with the images as they were"
        )
    check_teacher(saved, training)
    training.moco.load_state_dict({key.removeprefix("module."): value for key, value in saved["state_dict"].items()})
    if training.distiller:
        for stage in training.distiller.stages:
            old, new = saved["mgd"][f"margin{stage}"], training.distiller.margin(stage).cpu()
            if old.shape != new.shape or not torch.allclose(old, new):
                raise RunError("the checkpoint's margins are not this teacher's: resume with the same --teacher and --margins")
        try:
            training.distiller.load_state_dict(saved["mgd"])
            training.distiller.factor.fill_(factor(saved, training))
        except RuntimeError as error:
            raise RunError(
                f"the checkpoint's matchings do not fit this teacher and reducer: {str(error).splitlines()[-1].strip()}"
            ) from None
    load_optimizer(training.optimizer, saved["optimizer"], training.config)
    if saved.get("statistics") is not None and saved["workers"] == training.run.size:
        statistics.load(training.trained, saved["statistics"][training.run.rank])
    training.run.bad_images.update(saved.get("bad_images", ()))
    return saved["epoch"], saved["step"]


def check_teacher(saved: dict, training: Training) -> None:
    """RunError: --teacher has other weights than the teacher of the checkpoint."""
    config, now = training.config, training.teacher_digest
    before = saved.get("teacher") or now  # older checkpoints have no digest
    if before != now:
        raise RunError(
            f"--teacher {config.teacher}: weights of SHA-256 {now}; expected {before}, those of {saved['config']['teacher']}, "
            "with which the checkpoint was trained. Give that teacher, or start a new run"
        )


def nothing_to_do(start: tuple[int, int], epochs: int, steps: int) -> str:
    """The last line of a run that has done more than --epochs: (epoch, step) `start`, with so many steps an epoch."""
    epoch, step = start
    part = f" and {step} of {steps} steps" if step else ""
    return f"nothing to do, and nothing changed: {epoch} epochs{part} are done; --epochs is {epochs}"


def factor(saved: dict, training: Training) -> float:
    """Return the loss factor to go on with, and say where it is another than the saved one.

    It is the option's, or, with --loss-share, the saved one made to fit another share.
    """
    config, old = training.config, saved["mgd"]["factor"].item()
    new = old * (saved["config"]["loss_share"] / config.loss_share) if config.loss_share else config.loss_factor
    if new != old:
        training.run.log.line(f"loss factor {new:.6g}; it was {old:.6g} in the checkpoint")
    return new


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, config: Config | LinearConfig) -> None:
    """Load an optimizer's momenta; its settings are those of the options, which may differ from the saved ones."""
    optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group.update(momentum=config.momentum, weight_decay=config.weight_decay)


def save(training: Training, epoch: int, step: int) -> None:
    """Save a run of which `epoch` epochs and `step` steps of the next are done. A collective: all workers call it.

    What others see are the averages of the workers' batch norm statistics. Within an epoch the workers' own
    are saved beside them, so that a resume goes on with the same bytes. RunError: parameters that are not finite, or that
    are not the same on all workers, or a disk that does not take them.
    """
    run, trained = training.run, training.trained
    check_finite(trained.parameters(), epoch, step)
    replicas.check(training.common(), f"after epoch {epoch}, step {step}, and are not saved")
    own = statistics.gather(trained) if step else None
    if own is not None:
        statistics.load(trained, own.mean(0))

    def write() -> None:
        content = {
            "epoch": epoch,
            "arch": training.config.arch,
            "state_dict": {f"module.{key}": value for key, value in training.moco.state_dict().items()},
            "optimizer": training.optimizer.state_dict(),
            "step": step,
            "steps": run.count.at(epoch, step),
            "mgd": training.distiller.state_dict() if training.distiller else {},
            "teacher": training.teacher_digest,
            "bad_images": sorted(run.bad_images),
            "config": dataclasses.asdict(training.config),
            "workers": run.size,
            "images": len(training.images),
            "order": training.order(epoch),
            "statistics": own,
        }
        run.log.sync()
        run.log.line(f"saved {run.checkpoints.save(content)}")

    run.on_first(write)
    if own is not None:
        statistics.load(trained, own[run.rank])
