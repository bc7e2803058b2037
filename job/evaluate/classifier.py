"""A linear classification on frozen features: build, save and resume it."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from job.checkpoints.folder import AUTO, BEST, LAST, load
from job.checkpoints.foreign import read_backbone
from job.cluster import comm
from job.config import WITHOUT_EFFECT, LinearConfig
from job.data import digits, randomness
from job.data.augment import CentreView, ClassifierView
from job.data.folders import TrainingOrder, scan, scan_validation
from job.data.images import Images
from job.data.views import OneView
from job.engine import replicas
from job.engine.fixed_point import FixedPointGradients
from job.engine.lars import LARS
from job.engine.resume import (
    check_finite,
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
from job.errors import RunError, of_option
from job.networks import ARCHS, WIDTH, Network, build_network, with_features
from job.position import Position
from job.text import plural


@dataclass
class Classifier:
    """A frozen network whose `fc` is trained. `encoder` computes its features."""

    config: LinearConfig
    run: Run
    train: Images
    val: Images
    net: Network
    encoder: nn.Module  # images -> {"flatten": (B, C)}, with the network's parameters
    gradients: FixedPointGradients
    optimizer: torch.optim.Optimizer
    input: dict  # the network's requirements for its images, {} for a ResNet
    best: float = -1.0  # top-1 in percent on the validation images, of the best epoch so far

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.train) // self.config.batch_size

    def order(self, epoch: int) -> str:
        """Return the digest of the names of an epoch's training images, in their order."""
        return self.train.digest(self.config.seed, epoch, self.config.batch_size)

    def batches(self, start: Position) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        """Iterate over this worker's training batches from a position.

        A batch: views (B, 3, H, W) uint8, labels (B,), undecodable files.
        """
        config, run = self.config, self.run
        order = TrainingOrder(
            self.train, config.batch_size, run.rank, run.size, config.seed, config.epochs, start
        )
        view = (
            ClassifierView(config.image_size) if config.augment else CentreView(config.image_size)
        )
        return run.batches(OneView(self.train, view, config.seed), order, config.workers)

    def backbone(self) -> dict[str, torch.Tensor]:
        """The frozen tensors, by name."""
        return {
            name: value
            for name, value in self.net.state_dict().items()
            if not name.startswith("fc.")
        }

    def common(self) -> dict[str, torch.Tensor]:
        """Return all tensors that must be equal on all workers, by name, also the frozen ones."""
        return self.backbone() | replicas.shared(self.net, self.optimizer)


def build(config: LinearConfig, run: Run) -> Classifier:
    """Build a classification. The defaults of network and crop are in the --pretrained file.

    RunError: the data, the checkpoint or the batch size does not fit.
    """
    trains = not (config.knn or config.evaluate)
    data, bad = digits.all_prepared, config.max_bad_images
    train = run.on_first(lambda: scan(data(config.images_from), "train", max_bad=bad))
    val = run.on_first(lambda: scan_validation(data(config.images_from), train))
    for line in (*train.lines, *val.lines):
        run.log.line(line)
    for id, text in train.hints.items():
        run.log.remark("hint", id, text)
    if trains and train.labelled < len(train):
        unlabelled = len(train) - train.labelled
        raise RunError(
            f"{unlabelled} of {len(train)} images in {train.root} have no label;"
            " expected a label for each"
        )
    if trains and len(train) < config.batch_size:
        raise RunError(
            f"--batch-size {config.batch_size}: {train.root} has only "
            f"{plural(len(train), 'image')}; expected at most {len(train)}. "
            "Choose a smaller batch, or add images"
        )
    net, config, required = frozen(config, run)
    assert isinstance(net.fc, nn.Linear)
    width = net.fc.in_features
    net.fc = nn.Linear(width, len(train.classes))
    nn.init.normal_(net.fc.weight, std=0.01)
    nn.init.zeros_(net.fc.bias)
    net.to(run.device)
    comm.broadcast_(net.state_dict())
    optimizer_class = LARS if config.lars else torch.optim.SGD
    parameters, decay = net.fc.parameters(), config.weight_decay
    optimizer = optimizer_class(parameters, config.lr, momentum=config.momentum, weight_decay=decay)
    gradients = FixedPointGradients(net.fc.named_parameters(prefix="fc"))
    encoder = with_features(net, [], output="flatten").eval()
    return Classifier(config, run, train, val, net, encoder, gradients, optimizer, required)


def frozen(config: LinearConfig, run: Run) -> tuple[Network, LinearConfig, dict]:
    """Return the frozen network in eval mode, the completed options, and its input requirements.

    The options get its architecture, first layer and crop. The requirements of a ResNet are {}.
    RunError: the checkpoint cannot be used, or has another first layer, or the crop is too small.
    """
    weights, size = None, 224
    if config.pretrained:
        named = (config.resume, os.path.join(run.folder, LAST)) if config.evaluate else ()
        option = "--resume" if config.pretrained in named else "--pretrained"
        with of_option(option, config.pretrained):
            weights = run.on_first(
                lambda: read_backbone(config.pretrained, config.arch, arch_flag="--arch")
            )
        check_first_layer(config, weights.arch)
        if config.stem not in ("", weights.stem):
            raise RunError(f"--stem {config.stem}: {config.pretrained} has the stem {weights.stem}")
        if config.width not in (0, weights.width):
            raise RunError(
                f"--width {config.width}: {config.pretrained} has {weights.width} channels"
                " in its first stage"
            )
        config = dataclasses.replace(
            config, arch=weights.arch, stem=weights.stem, width=weights.width
        )
        size = weights.meta["config"].get("image_size", weights.image_size or size)
        run.log.line(f"frozen: {weights.report}")
    if not weights:
        check_first_layer(config, config.arch or "resnet18")
    config = dataclasses.replace(
        config,
        arch=config.arch or "resnet18",
        stem=config.stem or "imagenet",
        width=config.width or WIDTH,
        image_size=config.image_size or size,
    )
    if config.image_size < 8:
        raise RunError(f"--image-size {config.image_size}: expected 8 or more")
    if not config.pretrained:
        run.log.line(
            f"frozen: {config.arch} with random weights, the baseline (no --pretrained is given)"
        )
    # The seed of job.train, whose student starts with the same weights by default.
    torch.manual_seed(randomness.torch_seed(config.seed, "weights"))

    def build() -> Network:
        if weights:
            return weights.build(config.image_size)
        size = config.image_size
        return build_network(config.arch, stem=config.stem, width=config.width, image_size=size)

    net = run.build(config.arch, build)
    required = weights.input if weights and not weights.is_resnet else {}
    return net.requires_grad_(False).eval(), config, required


def check_first_layer(config: LinearConfig, arch: str) -> None:
    """RunError: --stem or --width is given for a network other than a ResNet."""
    for name in ("stem", "width"):
        if getattr(config, name) and arch not in ARCHS:
            raise RunError(
                f"--{name}: no effect on {arch}, which is not a ResNet of torchvision; leave it out"
            )


def find(config: LinearConfig, run: Run) -> dict | None:
    """Return the checkpoint of --resume, or None if `auto` finds no checkpoint.

    RunError: all checkpoints are incomplete, or another run's.
    """
    if not config.resume:
        return None
    if config.resume == AUTO or (not config.evaluate and resumed_before(config, run)):
        return newest(run)
    if not config.evaluate:
        run.on_first(lambda: check_folder(config, run))
    return load_named(config, run)


def restore(saved: dict, classifier: Classifier) -> Position:
    """Load a checkpoint's classifier. Return the (epoch, step) to resume at.

    RunError: the checkpoint has other data, features or another optimizer.
    """
    config, where = classifier.config, f"the checkpoint of --resume {classifier.config.resume}"
    if "format" not in saved or "best_acc1" not in saved:
        raise RunError(
            f"{where}: not a linear classifier; expected a checkpoint of job.linear."
            " Give a file of features with --pretrained"
        )
    check_format(saved)
    if saved["classes"] != classifier.train.classes:
        raise RunError(
            f"{where} has {len(saved['classes'])} classes; expected the classes of"
            f" {classifier.train.root}"
        )
    state = {name.removeprefix("module."): value for name, value in saved["state_dict"].items()}
    if differs := different(state, classifier.backbone()):
        raise RunError(
            f"{where} was trained on other features ({differs} differs)."
            " Resume with the --pretrained of its start"
        )
    if not config.evaluate:
        check_same_optimizer(saved["config"].get("lars", False), config.lars, where)
    if saved["step"]:
        check_same_epoch(saved, classifier, where)
    log_changes(saved["config"], config, where, classifier.run, WITHOUT_EFFECT)
    if not config.evaluate:
        warn_of_rate(saved, config, classifier.run)
    log_workers(saved, where, classifier.run)
    classifier.net.load_state_dict(state)
    load_optimizer(classifier.optimizer, saved["optimizer"], config)
    classifier.best = saved["best_acc1"]
    classifier.run.bad_images.update(saved.get("bad_images", ()))
    return Position(saved["epoch"], saved["step"])


def settle_best(classifier: Classifier, start: Position) -> None:
    """Remove best.pth.tar if it is later than `start`, where the run resumes. A collective.

    Without such a file, the next accuracy is the best.
    """
    run = classifier.run

    def has_best() -> bool:
        path = os.path.join(run.folder, BEST)
        if not os.path.exists(path):
            return False
        try:
            best = load(path)
            if not best.keys() >= {"epoch", "step"}:
                raise RunError(f"{path}: no epoch and step; expected a checkpoint of job.linear")
        except RunError as error:
            run.log.line(f"skipped: {error}; the best from epoch {start.epoch} on replaces it")
            return False
        if (best["epoch"], best["step"]) <= start:
            return True
        os.remove(path)
        run.log.line(
            f"going back: {path}, of epoch {best['epoch']}, is removed;"
            f" the best from epoch {start.epoch} on replaces it"
        )
        return False

    if not run.on_first(has_best):
        classifier.best = -1.0


def check_same_optimizer(before: bool, now: bool, where: str) -> None:
    """RunError: a classifier that was trained with LARS would resume with SGD, or vice versa."""
    if before != now:
        given, was = ("--lars", "SGD") if now else ("--no-lars", "LARS")
        fix = "Leave it out" if now else "Give --lars"
        problem = f"{where} was trained with {was}; expected the same optimizer"
        raise RunError(f"{given}: {problem}. {fix}, or start a new run")


def check_same_epoch(saved: dict, classifier: Classifier, where: str) -> None:
    """RunError: an epoch cannot resume, because its images or its batches have changed."""
    config, old = classifier.config, saved["config"]
    changes = {
        "--seed": (old["seed"], config.seed),
        "--batch-size": (old["batch_size"], config.batch_size),
        "number of images": (saved["images"], len(classifier.train)),
        "files or their order": (saved["order"], classifier.order(saved["epoch"])),
    }
    for name, (then, now) in changes.items():
        if then != now:
            raise RunError(
                f"{where} was saved within an epoch, so the {name} cannot change: {then}, now {now}"
            )


def different(state: dict[str, torch.Tensor], backbone: dict[str, torch.Tensor]) -> str:
    """Return the first name whose bytes in `state` differ from `backbone`, or ""."""
    return next(
        (name for name, value in backbone.items() if not same_bytes(state.get(name), value)), ""
    )


def same_bytes(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit. A NaN equals itself, and 0 is not -0."""
    if one is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.cpu().contiguous().numpy().tobytes() == other.cpu().contiguous().numpy().tobytes()


def save(classifier: Classifier, epoch: int, step: int, is_best: bool) -> None:
    """Save a classifier after `epoch` epochs and `step` steps of the next. A collective."""
    run = classifier.run
    check_finite(classifier.net.fc.parameters(), epoch, step)
    replicas.check(classifier.common(), f"after epoch {epoch}, step {step}, and are not saved")

    def write() -> None:
        content = {
            "epoch": epoch,
            "arch": classifier.config.arch,
            "state_dict": {
                f"module.{name}": value for name, value in classifier.net.state_dict().items()
            },
            "best_acc1": classifier.best,
            "optimizer": classifier.optimizer.state_dict(),
            "step": step,
            "steps": run.count.at(epoch, step),
            "config": dataclasses.asdict(classifier.config),
            "workers": run.size,
            "images": len(classifier.train),
            "order": classifier.order(epoch),
            "classes": classifier.train.classes,
            "bad_images": sorted(run.bad_images),
            **({"input": classifier.input} if classifier.input else {}),
        }
        run.save(content, is_best)

    run.on_first(write)
