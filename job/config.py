"""Every option of the programs."""

import os
from dataclasses import dataclass
from typing import Any

from job import cli
from job.cli import option
from job.errors import RunError
from job.schedules import parse_refresh, parse_save_every
from mgd.reducers import REDUCERS
from moco.encoder import ARCHS, DEPTH, STEMS, WIDTH, WIDTHS

# Flags of the original that Horovod, or this program's own way, replaces.
RETIRED = {
    "--dist-url": "Horovod's workers find each other; start them with `horovodrun -np N python -m ...`",
    "--dist-backend": "Horovod chooses NCCL or Gloo itself; leave it out",
    "--world-size": "the number of workers is horovodrun's: `horovodrun -np N python -m ...`",
    "--rank": "the launcher numbers the workers: `horovodrun -np N python -m ...`",
    "--multiprocessing-distributed": "one process a GPU is horovodrun's work: `horovodrun -np N python -m ...`",
    "--gpu": "each worker takes the GPU of its local rank; choose some with CUDA_VISIBLE_DEVICES",
    "--start-epoch": "a checkpoint knows its epoch and step; use `--resume auto`",
}
# What matters beside a --teacher alone.
OF_TEACHER = {"teacher_arch", "reducer", "loss_factor", "loss_share", "loss_ramp", "margins", "mgd_stages", "stage_weights"}
OF_TEACHER |= {"matching", "mgd_images", "refresh_epochs"}
WITHOUT_EFFECT = {"resume", "config", "out", "workers", "check_every", "print_freq", "tensorboard"}  # on what is computed
LOSS_FACTOR = "the distillation loss is divided by it (default: as --loss-share has it; it is left out where this is given)"
LOSS_SHARE = (
    "the distillation loss at the start over ln(K + 1), the contrastive loss of guessing; the factor is measured for it "
    "(0: it is not)"
)
STUDENT_WIDTH = "the student's channels in its first stage; the later ones have 2, 4 and 8 times as many (64: as published)"
OWN_WIDTH = "channels in its first stage (default: as --pretrained says, or 64)"
KNN_K = "nearest training images that vote in k-NN (0: 200, or the mean size of a class if that is less)"
LOADERS = "data loading processes of each worker (-1: as many as it has cores; 0: none)"


@dataclass
class Config:
    """The options of `job.train`, under MoCo's own names where MoCo has them."""

    data: str = option(
        "", "folder with train/<class>/*; or the word digits: scikit-learn's digits, written to data/digits", path=True
    )
    config: list[str] = option([], "a YAML file, or a preset's name; may be given again", many=True, path=True)
    out: str = option("", "folder of this run (default: runs/ARCH)", path=True)

    arch: str = option("resnet18", "the student's network", "-a", choices=ARCHS)
    stem: str = option("imagenet", "small: a first layer for images of about 32 pixels, of student and teacher", choices=STEMS)
    width: int = option(WIDTH, STUDENT_WIDTH, at_least=WIDTHS.start, at_most=WIDTHS[-1], multiple_of=WIDTHS.step)
    zero_init_residual: bool = option(False, "every residual block begins as the identity, so that a deep network begins shallow")
    image_size: int = option(224, "side of the views in pixels", at_least=8, at_most=4096)
    aug_plus: bool = option(False, "MoCo v2's augmentations")
    augment_on: str = option("cpu", "where colours, blur and flips are computed", choices=("cpu", "device"))
    crop_min: float = option(0.2, "smallest share of an image's area that a view shows", above=0.0, at_most=1.0)

    epochs: int = option(200, "epochs to train", at_least=1, at_most=10**6)
    batch_size: int = option(256, "images in a step, over all workers together", "-b", at_least=1)
    accumulate: int = option(1, "parts of a worker's batch that pass one after the other, to save memory", at_least=1)
    lr: float = option(0.03, "learning rate", "--learning-rate", at_least=0.0)
    schedule: list[int] = option([120, 160], "epochs at which the learning rate falls tenfold", at_least=0, many=True)
    cos: bool = option(False, "cosine learning rate in place of --schedule")
    warmup_epochs: int = option(3, "epochs over which the learning rate rises", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0.0, below=1.0)
    weight_decay: float = option(1e-4, "weight decay", "--wd", at_least=0.0)
    precision: str = option("float32", "bf16: autocast, where the hardware has it (see README)", choices=("float32", "bf16"))
    compile: bool = option(False, "compile the networks: minutes at the start, faster steps (see README)")
    fp16_allreduce: bool = option(False, "sum gradients over the workers in half precision, for slow networks")
    seed: int = option(0, "all random numbers follow from it", at_least=0, below=2**63)
    workers: int = option(-1, LOADERS, "-j", at_least=-1, at_most=512)

    moco_dim: int = option(128, "width of the contrastive features", at_least=1, at_most=2**13)
    moco_k: int = option(65536, "negative keys in the queue", at_least=1, at_most=2**24)
    moco_m: float = option(0.999, "momentum of the key encoder", at_least=0.0, below=1.0)
    moco_t: float = option(0.07, "softmax temperature", above=0.0)
    mlp: bool = option(False, "MoCo v2's head of two layers")

    teacher: str = option("", "checkpoint of the teacher; without one this is plain MoCo", path=True)
    teacher_arch: str = option("", "the teacher's network (default: as its file says)", choices=("", *ARCHS))
    reducer: str = option("amp", "how the teacher channels of a match become one", choices=tuple(REDUCERS))
    loss_factor: float = option(1e4, LOSS_FACTOR, above=0.0, instead_of="loss_share")
    loss_share: float = option(10.0, LOSS_SHARE, at_least=0.0)
    loss_ramp: bool = option(False, "the distillation loss falls in a straight line to nothing at the run's last step")
    margins: str = option("loaded", "init: margins of an unloaded teacher, as the original had", choices=("loaded", "init"))
    mgd_stages: list[int] = option([1, 2, 3, 4], "stages to distil", at_least=1, below=DEPTH + 1, many=True)
    stage_weights: list[float] = option([], "their weights, in order (default: 1 / 2^(4 - i))", at_least=0.0, many=True)
    matching: str = option("solved", "random: drawn from the seed and never solved, a control", choices=("solved", "random"))
    mgd_images: int = option(20_000, "images that a refresh measures", at_least=1)
    refresh_epochs: str = option("log", "when the matching is solved: log, never, every:N, or 0,5,10", parse=parse_refresh)

    resume: str = option("", "auto: go on from the newest checkpoint in --out, if any; or a checkpoint's path", path=True)
    save_every: str = option("1", "epochs between checkpoints; or steps, as in 500steps", parse=parse_save_every)
    keep: int = option(3, "checkpoints kept", at_least=1)
    check_every: int = option(100, "steps between checks that the workers still have the same networks and queue", at_least=1)
    print_freq: int = option(10, "steps between lines where there is no terminal", "-p", at_least=1)
    tensorboard: bool = option(False, "write event files for TensorBoard, to tensorboard/ in the run's folder")
    max_bad_images: int = option(100, "undecodable images after which the run fails", at_least=0)
    knn_every: int = option(0, "epochs between k-NN accuracies on val/ (0: none)", at_least=0)
    knn_k: int = option(0, KNN_K, at_least=0)

    def __post_init__(self) -> None:
        given, self.mgd_stages = self.mgd_stages, sorted(set(self.mgd_stages))
        if not self.mgd_stages:
            raise RunError(f"--mgd-stages []: expected some of 1 to {DEPTH}; without --teacher nothing is distilled")
        if self.stage_weights:
            check_weights(self.stage_weights, given)
        if self.matching == "random":
            self.refresh_epochs = "never"  # as all who ask for it are to see

    def folder(self) -> str:
        """The run's folder."""
        return self.out or os.path.join("runs", self.arch)


def check_weights(weights: list[float], stages: list[int]) -> None:
    """RunError: not one weight for each of the stages, which are to be in their order, or none that counts."""
    shown = f"--stage-weights {' '.join(f'{weight:g}' for weight in weights)}"
    named = " ".join(map(str, stages))
    if stages != sorted(set(stages)):
        raise RunError(f"{shown}: expected --mgd-stages in ascending order, each once, not {named}: give both in that order")
    if len(weights) != len(stages):
        raise RunError(f"{shown}: expected {len(stages)}, a weight for each of --mgd-stages {named}")
    if not any(weights):
        raise RunError(f"{shown}: expected one above 0 at least; without --teacher nothing is distilled")


@dataclass
class LinearConfig:
    """The options of `job.linear`: a linear classifier on frozen features, by MoCo's protocol."""

    data: str = option("", "folder with train/<class>/* and val/<class>/*; or the word digits", path=True)
    config: list[str] = option([], "a YAML file; may be given again", many=True, path=True)
    out: str = option(
        "", "folder of this run (default: the pretraining's, with -linear behind it; or runs/NAME-linear)", path=True
    )

    pretrained: str = option("", "checkpoint of the frozen network; without one it has random weights: the baseline", path=True)
    arch: str = option("", "the network (default: as --pretrained says, or resnet18)", "-a", choices=("", *ARCHS))
    stem: str = option("", "its first layer (default: as --pretrained says, or imagenet)", choices=("", *STEMS))
    width: int = option(0, OWN_WIDTH, at_least=0, at_most=WIDTHS[-1], multiple_of=WIDTHS.step)
    image_size: int = option(0, "side of the crops in pixels (default: the pretraining's, or 224)", at_least=0, at_most=4096)
    augment: bool = option(True, "random crops and flips in training; without, centre crops")

    epochs: int = option(100, "epochs to train", at_least=1, at_most=10**6)
    batch_size: int = option(256, "images in a step, over all workers together", "-b", at_least=1)
    lr: float = option(30.0, "learning rate", "--learning-rate", at_least=0.0)
    schedule: list[int] = option([60, 80], "epochs at which the learning rate falls tenfold", at_least=0, many=True)
    cos: bool = option(False, "cosine learning rate in place of --schedule")
    warmup_epochs: int = option(0, "epochs over which the learning rate rises", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0.0, below=1.0)
    weight_decay: float = option(0.0, "weight decay", "--wd", at_least=0.0)
    precision: str = option("float32", "bf16: autocast, where the hardware has it", choices=("float32", "bf16"))
    seed: int = option(0, "all random numbers follow from it", at_least=0, below=2**63)
    workers: int = option(-1, LOADERS, "-j", at_least=-1, at_most=512)

    knn: bool = option(False, "the k-NN accuracy of the features, in place of a classifier")
    knn_k: int = option(0, KNN_K, at_least=0)
    evaluate: bool = option(False, "the accuracy of --resume's classifier, without training it", "-e")
    resume: str = option("", "auto: go on from the newest checkpoint in --out, if any; or a checkpoint's path", path=True)
    save_every: str = option("1", "epochs between checkpoints; or steps, as in 500steps", parse=parse_save_every)
    keep: int = option(2, "checkpoints kept, beside the best", at_least=1)
    check_every: int = option(100, "steps between checks that the workers still have the same network", at_least=1)
    print_freq: int = option(10, "steps between lines where there is no terminal", "-p", at_least=1)
    tensorboard: bool = option(False, "write event files for TensorBoard, to tensorboard/ in the run's folder")
    max_bad_images: int = option(100, "undecodable images after which the run fails", at_least=0)

    def __post_init__(self) -> None:
        if self.knn and self.evaluate:
            raise RunError("--knn and --evaluate: each tells an accuracy in place of training; leave out one of them")
        if self.knn and self.resume not in ("", "auto"):
            raise RunError(f"--knn and --resume {self.resume}: k-NN has no classifier to resume; features go to --pretrained")

    def folder(self) -> str:
        """The run's folder."""
        folder, file = os.path.split(self.pretrained)
        if os.path.isfile(os.path.join(folder, "config.yaml")):  # a run's
            return self.out or f"{folder}-linear"
        return self.out or os.path.join("runs", f"{file.split('.')[0] or self.arch or 'resnet18'}-linear")


def read_config(argv: list[str], program: str = "job.train", kind: type = Config) -> Any:
    """Return the options of a program, a `kind`. RunError: anything unknown or out of range."""
    for argument in argv:
        if (name := argument.split("=")[0]) in RETIRED:
            raise RunError(f"{name} is not needed here: {RETIRED[name]}")
    config = cli.read(program, kind, argv)
    given = {argument.split("=")[0] for argument in argv}
    if config.cos and "--schedule" in given:
        raise RunError("--schedule: no effect beside --cos, which takes its place; leave out one of them, or add --no-cos")
    if kind is Config and config.loss_share and "--loss-factor" in given:
        raise RunError(
            f"--loss-factor: no effect beside --loss-share {config.loss_share:g}, which measures another; leave out one of them"
        )
    if kind is Config and config.matching == "random" and "--refresh-epochs" in given:
        raise RunError("--refresh-epochs: no effect beside --matching random, which is never solved; leave out one of them")
    return config
