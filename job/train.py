"""Train a MoCo v2 student, guided by a teacher through MGD if one is given:

horovodrun -np N python -m job.train DIR -a resnet18 --mlp --moco-t 0.2 --aug-plus --cos --teacher FILE
"""

import dataclasses
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from job.cluster import launch
from job.cluster.memory import give_back
from job.cluster.stop import Stopped
from job.config import Config, read_config
from job.data import randomness
from job.data.augment import normalize
from job.data.images import Images
from job.distill.loss_factor import set_factor
from job.distill.mgd import refresh
from job.engine import replicas, resume, statistics
from job.engine.run import Run
from job.engine.state import Training, build
from job.evaluate.knn import knn_accuracy
from job.metrics import collapse, tensorboard
from job.metrics.hints import Expectation
from job.metrics.meter import ContrastJournal
from job.schedules import learning_rate, parse_refresh, parse_save_every, pull


def main(argv: list[str] | None = None) -> None:
    """Run `job.train` on the command line's options."""
    with launch.reported_errors():
        config: Config = read_config(sys.argv[1:] if argv is None else argv)
        events_every = config.print_freq if config.tensorboard else 0
        with Run(config.folder(), config.keep, events_every, dataclasses.asdict(config)) as run:
            try:
                train(config, run)
            except Stopped:
                run.stop.ignore()
                run.log.line("stopped by a signal; --resume auto goes on from here")


def train(config: Config, run: Run) -> None:
    """Train to the last epoch, from the start or from a checkpoint. Stopped, after a save: a signal came."""
    # All that can be wrong shows before a file is written.
    saved = resume.find(config, run)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("config", "out", "resume")}
    config.workers = launch.cores() if config.workers < 0 else config.workers
    training = build(config, run)
    start = resume.restore(saved, training) if saved else (0, 0)
    if start > (config.epochs, 0):
        run.log.line(resume.nothing_to_do(start, config.epochs, training.steps))
        return
    run.begin(options, saved, training.steps, config.resume)
    del saved  # as large as all that is trained
    share = run.share(config.batch_size)
    run.log.line(f"{len(training.images)} images, {training.steps} steps an epoch, {share} images a worker and step")

    expectation = Expectation(config, len(training.images), run.size)
    for line in expectation.lines():
        run.log.line(line)

    batches = training.batches(start)
    journal = ContrastJournal(run, config.batch_size, config.print_freq, expectation)
    for epoch in range(start[0], config.epochs):
        first = start[1] if epoch == start[0] else 0
        if first == 0:
            between_epochs(training, epoch)
        rate = learning_rate(config, epoch)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        give_back()
        journal.start_epoch(epoch, rate)
        train_epoch(training, batches, journal, epoch, range(first, training.steps))
    between_epochs(training, config.epochs)
    run.end(f"done: {config.epochs} epochs; the newest checkpoint is {run.folder}/last.pth.tar")


def between_epochs(training: Training, epoch: int) -> None:
    """Do the work after `epoch` epochs: the k-NN accuracy, and for a next epoch the refresh and the loss factor.

    Stopped: a signal came. Then (epoch, 0) is saved, and the resumed run does all of this work again.
    """
    config, run, last = training.config, training.run, epoch == training.config.epochs
    try:
        if training.val and epoch and (last or epoch % config.knn_every == 0):
            neighbours(training, training.val, epoch)
        if training.distiller and not last and parse_refresh(config.refresh_epochs)(epoch):
            refresh(training, epoch)
        if training.distiller and not last and config.loss_share and epoch == 0:
            set_factor(training)
    except Stopped:
        if epoch == 0:
            run.log.line("no step is done yet, and there is nothing to save")
        elif not run.saved(epoch, 0):
            resume.save(training, epoch, 0)
        raise
    if training.distiller:
        tensorboard.distiller(run, epoch, training.distiller)


def train_epoch(training: Training, batches: Iterator, journal: ContrastJournal, epoch: int, steps: range) -> None:
    """Do `steps` of an epoch, of which the last ends it. Stopped, after a save: a signal came."""
    config, run, moco, gradients = training.config, training.run, training.moco, training.gradients
    share = run.share(config.batch_size) // config.accumulate  # b, images that are in the networks at a time
    positive = torch.zeros(share, dtype=torch.long, device=run.device)  # the positive is every query's logit 0
    save_at = parse_save_every(config.save_every)
    for step in steps:
        with journal.waiting():
            query, key, undecodable = next(batches)  # (B, 3, H, W) uint8 each
        if step == 0:
            tensorboard.pairs(run, epoch, query, key)
        permutation = randomness.permutation(config.batch_size, config.seed, "shuffle", epoch=epoch, step=step)  # (NB,)
        keys = moco.keys(key, torch.from_numpy(permutation), config.accumulate)
        weight = pull(epoch, step, config.epochs, training.steps) if config.loss_ramp else 1.0

        gradients.clear()
        told = torch.zeros(3, device=run.device)  # contrastive and distillation loss, correct queries
        for part, images in enumerate(normalize(query).chunk(config.accumulate)):  # (b, 3, H, W)
            with run.autocast(config.precision):
                wanted = targets(training, images, epoch, step, part) if training.distiller else None  # while key images travel
                logits, features = moco(images, keys, part)  # (b, 1 + K), L x (b, S, H, W)
                contrastive = F.cross_entropy(logits, positive)
                distillation = training.distiller(features, wanted) if training.distiller else torch.zeros_like(contrastive)
                distillation = weight * distillation
                del wanted  # the backward pass has a use for its memory
            ((contrastive + distillation) / config.accumulate).backward()
            told += torch.stack([contrastive.detach(), distillation.detach(), (logits.argmax(1) == 0).sum()])
        gradients.wait()
        sums = run.total(
            loss=told[:2].sum() / config.accumulate,
            contrastive=told[0] / config.accumulate,
            distillation=told[1] / config.accumulate,
            gradient=gradients.norm(),
            correct=told[2],
            stop=run.stop.signal is not None,
            undecodable=len(undecodable),
        )
        journal.check_finite(step, sums, gradients)
        training.optimizer.step()
        moco.enqueue(keys.total)

        journal.step(step, sums)
        if sums["undecodable"]:
            run.note_bad_images(undecodable, config.max_bad_images, len(training.images), training.images.root)

        done = (epoch, step + 1)
        checked = run.count.at(*done) % config.check_every == 0
        if checked:
            replicas.check(training.common(), f"after epoch {epoch}, step {done[1]}")
        if checked or step == steps[-1]:
            journal.watch(step, collapse.signs(moco, features))
        del images, logits, features, contrastive, distillation  # the next forward pass is to have their memory
        if step == steps[-1]:
            statistics.average(training.trained)
            done = (epoch + 1, 0)
        if sums["stop"] or done == (config.epochs, 0) or save_at(*done, run.count.at(*done)):
            resume.save(training, *done)
        if sums["stop"]:
            break
    journal.end_epoch()
    if sums["stop"]:
        raise Stopped


def neighbours(training: Training, val: Images, epoch: int) -> None:
    """Tell the k-NN accuracy of the student after `epoch` epochs; a run that goes on from there tells it again."""
    run, begun = training.run, time.perf_counter()
    accuracy = knn_accuracy(training.student(), training.images, val, training.config, run)
    seconds = time.perf_counter() - begun
    run.log.line(f"after {epoch} epochs: {accuracy.text}")
    numbers = {"knn": accuracy.top1, "knn_k": accuracy.k, "knn_images": accuracy.counted, "knn_seconds": seconds}
    run.log.record(steps=run.count.at(epoch, 0), epoch=epoch, step=0, **numbers)


@torch.no_grad()
def targets(training: Training, query: torch.Tensor, epoch: int, step: int, part: int) -> list:
    """Return what the student is to imitate of the teacher's features of a part's normalised queries (b, 3, H, W)."""
    config, run, distiller = training.config, training.run, training.distiller
    assert training.teacher and distiller
    teacher = training.teacher(query)  # {"layerN": (b, T, H, W)}
    place = run.rank * run.share(config.batch_size) + part * len(query)
    drop = torch.Generator(run.device)
    drop.manual_seed(randomness.torch_seed(config.seed, "drop", epoch=epoch, step=step, sample=place))
    return distiller.targets([teacher[f"layer{stage}"] for stage in distiller.stages], drop)


if __name__ == "__main__":
    main()
