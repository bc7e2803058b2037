"""Train a student without labels, by MoCo v2 and from a teacher through MGD by default:

horovodrun -np N python -m job.train DIR -a resnet18 --mlp --cos --teacher FILE
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from job import resume
from job.build import build
from job.cli import checked
from job.cluster import exits, task
from job.cluster.memory import give_back
from job.cluster.stop import Stopped
from job.config import Config, read_config, unused_options
from job.data.images import Images
from job.engine import replicas, statistics
from job.engine.call import Result, called, result
from job.engine.resume import nothing_to_do
from job.engine.run import Run
from job.evaluate.knn import knn_accuracy
from job.frameworks.base import Output
from job.hints import Expectation
from job.journal import TrainingJournal
from job.metrics import tensorboard
from job.metrics.callbacks import Callback
from job.position import START, Position
from job.schedules import learning_rate, parse_save_every
from job.text import plural
from job.training import Training


def main(argv: list[str] | None = None) -> None:
    """Run `job.train` on the command line's options."""
    with exits.reported_errors():
        config: Config = read_config(sys.argv[1:] if argv is None else argv)
        with Run.of(config.folder(), config) as run:
            try:
                train_epochs(config, run)
            except Stopped:
                run.stop.ignore()
                run.stopped()


def train(config: Config, callbacks: Sequence[Callback] = ()) -> Result:
    """Train a student from a script or a notebook, as `job.train` does on the command line.

    config: the options, by their names there. callbacks: receive the run's records, on rank 0.
    Return the run's folder, newest checkpoint and numbers.
    The process has its own settings again afterwards (job/engine/process_state.py).
    RunError: an option, the data or the machine is at fault.
    KeyboardInterrupt, after a save: a signal arrived.
    """
    config = checked(config)
    with called(Run.of(config.folder(), config, callbacks)) as run:
        train_epochs(config, run)
        return result(run)


def train_epochs(config: Config, run: Run) -> None:
    """Train from the start, or a checkpoint, to the last epoch.

    Stopped, after a save: a signal arrived.
    """
    # All errors of options and data are raised before a file is written.
    config, saved = resume.find(config, run)
    options = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("config", "out", "resume")
    }
    if config.workers < 0:
        config = dataclasses.replace(config, workers=task.cores())
    training = build(config, run)
    start = resume.restore(saved, training) if saved else START
    if start > (config.epochs, 0):
        run.log.line(nothing_to_do(start, config.epochs, training.steps))
        return
    images, losses = training.images, training.framework.losses
    labelled, unused = images.labelled, unused_options(config)
    run.begin(options, saved, len(images), config.resume, losses, labelled, unused)
    del saved  # as large as all that is trained

    distillers = training.distillation.distillers
    expectation = Expectation(config, training.framework, len(images), distillers)
    for line in expectation.lines():
        run.log.line(line)
    if not images.labelled:
        run.log.remark("hint", "unlabelled", unlabelled(images))
    for id, text in images.hints.items():
        run.log.remark("hint", id, text)
    for id, warning in expectation.warnings().items():
        run.log.remark("warning", id, warning)

    batches = training.batches(start)
    journal = TrainingJournal(
        run, config, training.framework, training.distillation.names, expectation
    )
    for epoch in range(start.epoch, config.epochs):
        first = start.step if epoch == start.epoch else 0
        if first == 0:
            between_epochs(training, epoch)
        rate = learning_rate(config, epoch)
        for group in training.optimizer.param_groups:
            group["lr"] = config.lr if group.get("fix_lr") else rate
        give_back()
        journal.start_epoch(epoch, rate)
        train_epoch(training, batches, journal, epoch, range(first, training.steps))
    between_epochs(training, config.epochs)
    epochs = plural(config.epochs, "epoch")
    run.end(f"done: {epochs}; the newest checkpoint is {run.folder}/last.pth.tar")


def unlabelled(images: Images) -> str:
    """Return a line about images without labels."""
    return (
        f"the images of {images.root} have no labels. Training needs none, but k-NN and job.linear "
        "do, and the report's pictures have no colours"
    )


def between_epochs(training: Training, epoch: int) -> None:
    """Compute the k-NN accuracy after `epoch` epochs, and prepare distillers for the next one.

    Stopped, after a save of (epoch, 0): a signal arrived. The resumed run repeats this work.
    """
    config, run, last = training.config, training.run, epoch == training.config.epochs
    try:
        if training.val and epoch and (last or epoch % config.knn_every == 0):
            report_knn(training, training.val, epoch)
        if not last:
            training.distillation.before_epoch(epoch)
    except Stopped:
        if epoch == 0:
            run.log.line("no step is done, so no checkpoint is saved")
        elif not run.saved(epoch, 0):
            training.save(Position(epoch, 0))
        raise
    tensorboard.histograms(run.log, epoch, training.distillation.histograms())


def train_epoch(
    training: Training, batches: Iterator, journal: TrainingJournal, epoch: int, steps: range
) -> None:
    """Train for `steps` to the end of an epoch. Stopped, after a save: a signal arrived."""
    config, run = training.config, training.run
    framework, distillation = training.framework, training.distillation
    gradients = training.gradients
    save_at = parse_save_every(config.save_every)
    for step in steps:
        position = Position(epoch, step)
        with journal.waiting():
            views, indices, undecodable = next(batches)  # framework.views x (B, 3, H, W) uint8
        if step == 0:
            tensorboard.views(run.log, framework.views_name, epoch, views)
        prepared = framework.prepare(views, position)

        # Forward and backward by micro-batch. The teacher's pass overlaps `prepare`'s exchange.
        gradients.clear()
        sums: dict[str, torch.Tensor] = {}  # () each
        for batch in training.micro_batches(views, indices, position):
            with run.autocast(config.precision):
                targets = distillation.targets(batch)
                output = framework.forward(batch, prepared)
                losses = output.losses | distillation.losses(
                    output, targets, position, training.steps
                )
            del targets  # memory for the backward pass
            (torch.stack([*losses.values()]).sum() / config.accumulate).backward()
            for name, value in (losses | output.metrics).items():
                sums[name] = sums.get(name, 0) + value.detach()

        # One collective for all scalars, and no update if one of them is not finite.
        gradients.wait()
        totals = run.total(
            loss=torch.stack([sums[name] for name in losses]).sum() / config.accumulate,
            **{name: sums[name] / config.accumulate for name in losses},
            **{name: sums[name] for name in output.metrics},
            gradient=gradients.norm(),
            stop=run.stop.signal is not None,
            undecodable=len(undecodable),
        )
        journal.check_finite(step, totals, gradients.not_finite)
        training.optimizer.step()
        framework.after_update(prepared)
        distillation.after_update()

        # Records.
        journal.step(step, totals)
        if totals["undecodable"]:
            run.note_bad_images(undecodable, config.max_bad_images, training.images)
        check_health(training, journal, output, position, last=step == steps[-1])
        del batch, output, losses  # memory for the next forward pass

        # Checkpoints.
        done = Position(epoch, step + 1)
        if step == steps[-1]:
            statistics.average(training.trained)
            done = Position(epoch + 1, 0)
        if totals["stop"] or done == (config.epochs, 0) or save_at(*done, run.count.at(*done)):
            training.save(done)
        if totals["stop"]:
            break
    journal.end_epoch()
    if totals["stop"]:
        raise Stopped


def check_health(
    training: Training,
    journal: TrainingJournal,
    output: Output,
    position: Position,
    last: bool,
) -> None:
    """Compare the workers and record the signs of collapse every --check-every steps.

    last: the epoch's last step, whose signs of collapse are always recorded.
    RunError, on all workers: shared tensors differ.
    """
    epoch, step = position
    due = training.run.count.at(epoch, step + 1) % training.config.check_every == 0
    if due:
        replicas.check(training.shared(), f"after epoch {epoch}, step {step + 1}")
    if due or last:
        journal.watch(step, training.framework.signs(output))


def report_knn(training: Training, val: Images, epoch: int) -> None:
    """Log and record the student's k-NN accuracy after `epoch` epochs.

    A run that resumes there repeats it.
    """
    run, started = training.run, time.perf_counter()
    accuracy = knn_accuracy(
        training.framework.student(), training.images, val, training.config, run
    )
    seconds = time.perf_counter() - started
    run.log.line(f"after {plural(epoch, 'epoch')}: {accuracy.text}")
    numbers = accuracy.numbers() | {"knn_seconds": seconds}
    run.log.record("knn", steps=run.count.at(epoch, 0), epoch=epoch, step=0, **numbers)


if __name__ == "__main__":
    main()
