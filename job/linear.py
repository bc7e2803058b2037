"""Evaluate the frozen features of a checkpoint by a linear classifier, by MoCo's protocol.

horovodrun -np N python -m job.linear DIR --pretrained runs/resnet18/last.pth.tar
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from job.checkpoints.folder import AUTO, LAST
from job.cli import checked
from job.cluster import exits, task
from job.cluster.memory import give_back
from job.cluster.stop import Stopped
from job.config import RECEIVERS, LinearConfig, check_receivers, read_config, unused_options
from job.data.augment import normalize
from job.declare import flag
from job.engine import replicas
from job.engine.call import Result, called, result
from job.engine.fixed_point import GROUP
from job.engine.passes import centre_crops
from job.engine.resume import nothing_to_do
from job.engine.run import Run
from job.errors import RunError
from job.evaluate import classifier
from job.evaluate.classifier import Classifier
from job.evaluate.knn import knn_accuracy
from job.metrics.callbacks import Callback
from job.metrics.meter import ClassifierJournal, Journal
from job.position import START, Position
from job.schedules import learning_rate, parse_save_every
from job.text import plural

BATCH = 64  # validation images at a time, for any number of workers
FIXED_POINT = 2.0**20  # losses are summed as integer multiples of 1 / FIXED_POINT


def main(argv: list[str] | None = None) -> None:
    """Run `job.linear` on the command line's options."""
    with exits.reported_errors():
        config: LinearConfig = read_config(
            sys.argv[1:] if argv is None else argv, "job.linear", LinearConfig
        )
        with Run.of(config.folder(), config) as run:
            try:
                classify(config, run)
            except Stopped:
                run.stop.ignore()
                if incomplete := trains_nothing(config):
                    raise RunError(incomplete, code=1) from None
                run.stopped()


def linear(config: LinearConfig, callbacks: Sequence[Callback] = ()) -> Result:
    """Evaluate features from a script or a notebook, as `job.linear` does on the command line.

    config: the options, by their names there. Return the run's folder, newest checkpoint and
    numbers, or with --knn and --evaluate the accuracy. All else is as in `job.train.train`.
    RunError: callbacks or event files are given with --knn or --evaluate, which write no records.
    """
    config = checked(config)
    receivers = {flag(name): getattr(config, name) for name in RECEIVERS}
    for receiver, given in (receivers | {"callbacks": callbacks}).items():
        check_receivers(config, receiver, given)
    with called(Run.of(config.folder(), config, callbacks), trains_nothing(config)) as run:
        return result(run, classify(config, run))


def trains_nothing(config: LinearConfig) -> str:
    """Return the error of a stop if the options compute an accuracy only, or ""."""
    if config.knn or config.evaluate:
        return "stopped by a signal: no accuracy is computed. Start the command again"
    return ""


def classify(config: LinearConfig, run: Run) -> dict[str, float] | None:
    """Train a classifier to the last epoch, or return an existing one's accuracy, or k-NN's.

    Stopped: a signal arrived. A classifier in training is saved.
    """
    processes = config.workers
    config = dataclasses.replace(config, workers=task.cores() if processes < 0 else processes)
    if config.evaluate and not config.pretrained:
        # A classifier's checkpoint has the frozen network too.
        checkpoint = f"{run.folder}/{LAST}" if config.resume == AUTO else config.resume
        config = dataclasses.replace(config, pretrained=checkpoint)
    parts = classifier.build(config, run)
    config = parts.config
    if config.knn:
        accuracy = knn_accuracy(parts.net, parts.train, parts.val, config, run)
        run.log.line(accuracy.text)
        return accuracy.numbers()
    saved = classifier.find(config, run)
    start = classifier.restore(saved, parts) if saved else START
    if config.evaluate:
        if not saved:
            raise RunError("--evaluate: expected a classifier. Give its checkpoint to --resume")
        numbers = validate(parts)
        report_accuracy(numbers, parts, "")
        return numbers
    if start > (config.epochs, 0):
        run.log.line(nothing_to_do(start, config.epochs, parts.steps))
        return None
    options = dataclasses.asdict(config) | {"workers": processes}
    for name in ("config", "out", "resume"):
        del options[name]
    run.begin(options, saved, len(parts.train), config.resume, unused=unused_options(config))
    if saved:
        classifier.settle_best(parts, start)
    del saved
    train(parts, start)
    return None


def train(parts: Classifier, start: Position) -> None:
    """Train a classifier from `start` to the last epoch.

    Stopped, after a save: a signal arrived.
    RunError, on all workers: the frozen network has changed.
    """
    config, run = parts.config, parts.run
    before = {name: value.clone() for name, value in parts.backbone().items()}
    batches = parts.batches(start)
    journal = ClassifierJournal(run, config.batch_size, config.print_freq)
    for epoch in range(start.epoch, config.epochs):
        rate = learning_rate(config, epoch)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate
        give_back()
        journal.start_epoch(epoch, rate)
        first = start.step if epoch == start.epoch else 0
        train_epoch(parts, batches, journal, epoch, range(first, parts.steps))
        end_epoch(parts, epoch)
    differs = classifier.different(before, parts.backbone())
    if run.total(differs=bool(differs))["differs"]:
        raise RunError(
            f"the frozen network has changed ({differs or 'on another worker'}): the "
            "accuracies are invalid. Check this machine's memory",
            code=1,
        )
    if start.epoch >= config.epochs:
        run.end(f"nothing to do: --epochs is {config.epochs}, and the checkpoint has {start.epoch}")
        return
    run.end(
        f"done: {plural(config.epochs, 'epoch')}, best top-1 {parts.best:.2f} %; the frozen "
        f"network is unchanged to the bit; checkpoints: {run.folder}/best.pth.tar and last.pth.tar"
    )


def end_epoch(parts: Classifier, epoch: int) -> None:
    """Validate after an epoch, and save the best, the last or a due classifier.

    Stopped, after a save: a signal arrived.
    """
    config, run, started = parts.config, parts.run, time.perf_counter()
    try:
        accuracy = validate(parts)
    except Stopped:  # the resumed run validates after no more steps
        if not run.saved(epoch, parts.steps):
            classifier.save(parts, epoch, parts.steps, is_best=False)
        raise
    seconds = time.perf_counter() - started
    report_accuracy(accuracy, parts, f"epoch {epoch} ")
    done = run.count.at(epoch + 1, 0)
    run.log.record(
        "validation", steps=done, epoch=epoch, step=parts.steps, **accuracy, val_seconds=seconds
    )
    is_best, parts.best = accuracy["val_top1"] > parts.best, max(accuracy["val_top1"], parts.best)
    due = parse_save_every(config.save_every)(epoch + 1, 0, done)
    if is_best or epoch + 1 == config.epochs or due:
        classifier.save(parts, epoch + 1, 0, is_best)


def train_epoch(
    parts: Classifier, batches: Iterator, journal: Journal, epoch: int, steps: range
) -> None:
    """Train for `steps` to the end of an epoch. Stopped, after a save: a signal arrived.

    If each worker's batch is a multiple of GROUP, the bytes are the same for any number of workers
    with equally many threads: the batch has the same groups, and their sums are exact. Otherwise
    they agree to rounding.
    """
    config, run, fc, gradients = parts.config, parts.run, parts.net.fc, parts.gradients
    save_at = parse_save_every(config.save_every)
    for step in steps:
        with journal.waiting():
            images, labels, undecodable = next(batches)  # (B, 3, H, W) uint8, (B,)
        images = images.to(run.device, non_blocking=True)
        labels = labels.to(run.device, non_blocking=True)

        # loss in fixed point, hits of top-1 and top-5
        totals = torch.zeros(3, dtype=torch.float64, device=run.device)
        gradients.clear()
        for pixels, truth in zip(images.split(GROUP), labels.split(GROUP), strict=True):
            with torch.no_grad(), run.autocast(config.precision):
                features = parts.encoder(normalize(pixels))["flatten"].float()  # (b, C)
            logits = fc(features)  # (b, classes)
            losses = F.cross_entropy(logits, truth, reduction="none")  # (b,)
            gradients.add(losses.sum() / config.batch_size)
            loss = (losses.detach().double() * FIXED_POINT).round().sum()
            totals += torch.stack([loss, hits(logits, truth, 1), hits(logits, truth, 5)])
        gradients.wait()
        sums = run.total(
            loss=totals[0],
            gradient=gradients.norm(),
            top1=totals[1],
            top5=totals[2],
            stop=run.stop.signal is not None,
            undecodable=len(undecodable),
        )
        sums["loss"] /= FIXED_POINT * config.batch_size  # the mean over the images
        journal.check_finite(step, sums, gradients.not_finite)
        parts.optimizer.step()

        journal.step(step, sums)
        if sums["undecodable"]:
            run.note_bad_images(undecodable, config.max_bad_images, parts.train)
        done = run.count.at(epoch, step + 1)
        if done % config.check_every == 0:
            replicas.check(parts.common(), f"after epoch {epoch}, step {step + 1}")
        if sums["stop"] or (step + 1 < parts.steps and save_at(epoch, step + 1, done)):
            classifier.save(parts, epoch, step + 1, is_best=False)
        if sums["stop"]:
            raise Stopped
    journal.end_epoch()


def hits(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Return how many of the labels (B,) are among the k largest of their logits (B, classes)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (B, k)
    return (best == labels[:, None]).sum()


@torch.no_grad()
def validate(parts: Classifier) -> dict[str, float]:
    """Return loss and accuracies in percent on the validation images, a collective.

    Each image counts once. The numbers are the same for any number of workers with equally many
    threads: batches do not depend on it, and the sums over them are integers.
    RunError, on all workers: the loss is not finite. Stopped, on all workers: a signal arrived.
    """
    config, run = parts.config, parts.run
    mine: dict[str, torch.Tensor | float] = dict.fromkeys(("loss", "top1", "top5", "counted"), 0.0)
    every = range(len(parts.val))
    for inputs, labels in centre_crops(parts.val, every, BATCH, config, run, "validating"):
        with run.autocast(config.precision):
            features = parts.encoder(inputs)["flatten"].float()
        logits = parts.net.fc(features)
        # The label of an undecodable image is -1.
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none").double()  # (b,)
        sums = {"loss": (loss * FIXED_POINT).round().sum(), "counted": (labels >= 0).sum()}
        sums |= {f"top{k}": hits(logits, labels, k) for k in (1, 5)}
        mine = {name: mine[name] + sums[name] for name in mine}
    total = run.total(**mine)
    counted = total["counted"]
    if not counted:
        raise RunError(
            f"{parts.val.root}: no labelled image can be decoded; expected one or more",
            code=1,
        )
    if not math.isfinite(total["loss"]):
        raise RunError(
            "the validation loss is not finite; the checkpoints are untouched. Try a lower --lr",
            code=1,
        )
    return {
        "val_loss": total["loss"] / FIXED_POINT / counted,
        "val_top1": 100 * total["top1"] / counted,
        "val_top5": 100 * total["top5"] / counted,
        "val_images": int(counted),
    }


def report_accuracy(accuracy: dict[str, float], parts: Classifier, when: str) -> None:
    """Log the accuracy on the validation images. when: begins the line."""
    parts.run.log.line(
        f"{when}validation on {parts.val.some(accuracy['val_images'])}: "
        f"top-1 {accuracy['val_top1']:.2f} %, top-5 {accuracy['val_top5']:.2f} %, "
        f"loss {accuracy['val_loss']:.4f}"
    )


if __name__ == "__main__":
    main()
