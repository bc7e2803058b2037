"""Every option of the programs, and the checks of options that depend on each other."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from job import cli
from job.declare import convert_lists, flag, groups, option, words_of
from job.distill import DISTILLERS
from job.distill.gram import GramOptions
from job.distill.mgd import MGDOptions
from job.distill.options import DistillOptions, is_feature_file
from job.distill.projector import ProjectorOptions
from job.distill.similarity import SimilarityOptions
from job.errors import RunError
from job.frameworks import FRAMEWORKS
from job.frameworks.moco import MoCoOptions
from job.frameworks.simsiam import SimSiamOptions
from job.networks import ARCHS, DEPTH, STEMS, WIDTHS, check_name
from job.options import Common, NeighborOptions, Options

# Flags of MoCo's own program that have no use here.
RETIRED = {
    "--dist-url": "start workers with `horovodrun -np N python -m ...`",
    "--dist-backend": "Horovod chooses NCCL or Gloo; leave it out",
    "--world-size": "horovodrun sets the number of workers: `horovodrun -np N python -m ...`",
    "--rank": "the launcher numbers the workers: `horovodrun -np N python -m ...`",
    "--multiprocessing-distributed": "start a worker a GPU: `horovodrun -np N python -m ...`",
    "--gpu": "each worker uses the GPU of its local rank; select GPUs with CUDA_VISIBLE_DEVICES",
    "--start-epoch": "a checkpoint has its epoch and step; use `--resume auto`",
}
NOTHING = "To distil nothing, leave out --teacher"
STAGES = ("mgd_stages", "projector_stages", "gram_stages")
WITHOUT_EFFECT = {"resume", "config", "out", "workers", "check_every", "print_freq"}
RECEIVERS = ("tensorboard", "log_to")  # of records
WITHOUT_EFFECT |= {*RECEIVERS}  # on the results
LARS_RATE = 0.1  # for a batch of 256, as SimSiam has published it
LINEAR_LR = "learning rate (default: 30, MoCo's for a batch of 256; with --lars 0.1 x batch / 256)"
LINEAR_LR += ". For SimSiam's features without --lars, 100"
OWN_WIDTH = "channels of the network's first stage (default: that of --pretrained, or 64)"


@dataclass(frozen=True)
class MethodOptions(Options):
    """Framework and distillers."""

    group = "method"

    framework: str = option(
        "moco",
        "framework that trains the student; none: distillers only",
        choices=FRAMEWORKS,
    )
    distill: list[str] = option(
        ["mgd"], "distillers, if --teacher is given", choices=DISTILLERS, many=True
    )


@dataclass(frozen=True)
class Config(
    MoCoOptions,
    SimSiamOptions,
    MGDOptions,
    ProjectorOptions,
    GramOptions,
    SimilarityOptions,
    MethodOptions,
):
    """Train a student on unlabelled images, with or without a teacher."""

    def __post_init__(self) -> None:
        convert_lists(self)
        for name in STAGES:
            if not getattr(self, name):
                raise RunError(f"{flag(name)} []: expected stages from 1 to {DEPTH}. {NOTHING}")
        if self.weak_views and self.aug_plus:
            raise RunError(
                "--weak-views and --aug-plus: expected one of them. "
                "Leave out one, or add --no-aug-plus"
            )
        if self.stage_weights:
            check_weights("stage_weights", self.stage_weights, "mgd_stages", self.mgd_stages)
        if not self.distill or len(set(self.distill)) < len(self.distill):
            given = " ".join(self.distill) or "[]"
            raise RunError(
                f"--distill {given}: expected at least one of {', '.join(DISTILLERS)}, each once"
            )
        if self.distill_weights:
            check_weights("distill_weights", self.distill_weights, "distill", self.distill)
        # Saved options show these values.
        for name in STAGES:
            object.__setattr__(self, name, sorted(set(getattr(self, name))))
        if self.matching == "random":
            object.__setattr__(self, "refresh_epochs", "never")

    def folder(self) -> str:
        """The run's folder."""
        return self.out or os.path.join("runs", file_name(self.arch))


def file_name(arch: str) -> str:
    """Return a network's name as the name of a folder: timm/resnet18 -> timm-resnet18."""
    return re.sub(r"[/:]", "-", arch)


# The options that have an effect only with --teacher.
OF_TEACHER = {"distill", "mgd_views"} | {
    name
    for group, found in groups(Config).items()
    if group in (DistillOptions.group, *DISTILLERS)
    for name in found.options
} - {"teacher"}


def check_weights(name: str, weights: list[float], of: str, items: Sequence[Any]) -> None:
    """RunError: not one weight for each item of the option `of`, or no weight above 0.

    Stages must be in ascending order, in which they are distilled.
    """
    shown = f"{flag(name)} {' '.join(f'{weight:g}' for weight in weights)}"
    named = " ".join(map(str, items))
    if of in STAGES and items != sorted(set(items)):
        raise RunError(
            f"{shown}: {flag(of)} is {named}; expected ascending stages, each once. "
            "Give both options in that order"
        )
    if len(weights) != len(items):
        raise RunError(f"{shown}: expected one weight for each of {flag(of)} {named}")
    if not any(weights):
        raise RunError(f"{shown}: expected at least one above 0. {NOTHING}")


def without_part(config: MethodOptions) -> dict[str, str]:
    """Return {option: reason} of the options of frameworks and distillers that are not chosen."""
    unused: dict[str, str] = {}
    for name, group in groups(Config).items():
        if name in FRAMEWORKS and name != config.framework:
            fix = f"leave it out, or choose --framework {name}"
            reason = f"with --framework {config.framework}; {fix}"
        elif name in DISTILLERS and name not in config.distill:
            reason = f"with --distill {' '.join(config.distill)}; leave it out, or add {name}"
        else:
            continue
        unused |= dict.fromkeys(group.options, reason)
    return unused


def without_teacher(config: Config) -> dict[str, str]:
    """Return {option: reason} of the options that have an effect only with a teacher."""
    if config.teacher:
        return {}
    return dict.fromkeys(OF_TEACHER, "without --teacher; leave it out, or add --teacher FILE")


def without_network(config: Config) -> dict[str, str]:
    """Return {option: reason} of the options of a teacher's network, if it has none."""
    if not is_feature_file(config.teacher):
        return {}
    reason = f"with --teacher {config.teacher}, a file of features; leave it out"
    return dict.fromkeys(("teacher_arch", "teacher_size"), reason)


def without_knn(config: Config) -> dict[str, str]:
    """Return {option: reason} of the options that have an effect only with k-NN accuracies."""
    if config.knn_every:
        return {}
    return {"knn_k": "without --knn-every; leave it out, or add --knn-every 1"}


def without_stem(config: Config) -> dict[str, str]:
    """Return {option: reason} of the options that only ResNets of torchvision have."""
    if config.arch in ARCHS:
        return {}
    reason = f"on {config.arch}, which is not a ResNet of torchvision; leave it out"
    return dict.fromkeys(("stem", "width", "zero_init_residual"), reason)


def without_head(config: Config, dims: tuple[int, int] | None = None) -> dict[str, str]:
    """Return {option: reason} if no chosen part has a head with a hidden layer.

    dims: outputs of the framework's head and of the teacher's, if known. A part that may have
    one counts without them.
    """
    framework, distillers = config.framework, config.distill if config.teacher else []
    heads = [framework] if "head_width" in FRAMEWORKS[framework].shapes else []
    heads += [name for name in distillers if DISTILLERS[name].has_hidden_layer(config, dims)]
    if heads and (heads != ["moco"] or config.mlp):
        return {}
    fix = "leave it out, or add --mlp" if heads else "leave it out"
    return {"head_width": f"without a head that has a hidden layer; {fix}"}


def refused_options(config: Config) -> dict[str, str]:
    """Return {option: reason} of the options without effect, which the command line refuses."""
    unused = without_part(config) | without_head(config) | without_stem(config)
    unused |= without_teacher(config) | without_network(config) | without_knn(config)
    if config.similarity != "compress":
        reason = f"with --similarity {config.similarity}, which has no momentum encoder"
        unused.setdefault("similarity_m", f"{reason}; leave it out, or choose compress")
    return unused


@dataclass(frozen=True)
class FrozenOptions:
    """Frozen network."""

    group = "network"

    pretrained: str = option(
        "",
        "checkpoint of the frozen network (default: random weights, the baseline)",
        path=True,
    )
    arch: str = option(
        "",
        "the network (default: that of --pretrained, or resnet18)",
        "-a",
        choices=("", *ARCHS),
        others=check_name,
    )
    stem: str = option(
        "",
        "the network's first layer (default: that of --pretrained, or imagenet)",
        choices=("", *STEMS),
    )
    width: int = option(0, OWN_WIDTH, at_least=0, at_most=WIDTHS[-1], multiple_of=WIDTHS.step)


@dataclass(frozen=True)
class ClassifierOptions:
    """Training and evaluation."""

    group = "classifier"

    augment: bool = option(True, "random crops and flips in training; if off, centre crops")
    evaluate: bool = option(
        False, "compute the accuracy of --resume's classifier without training", "-e"
    )
    lars: bool = option(False, "LARS instead of SGD. SimSiam's protocol is --config linear-lars")


@dataclass(frozen=True)
class FeatureOptions(NeighborOptions):
    """k-NN accuracy of features."""

    group = "knn"

    knn: bool = option(
        False, "compute the k-NN accuracy of the features instead of training a classifier"
    )


@dataclass(frozen=True)
class LinearConfig(FeatureOptions, ClassifierOptions, Common, FrozenOptions):
    """Train a linear classifier on frozen features, by MoCo's protocol."""

    data: str = option("", "folder with train/<class>/* and val/<class>/*; or digits", path=True)
    image_size: int = option(
        0,
        "side of the crops in pixels (default: that of --pretrained, or 224)",
        at_least=0,
        at_most=4096,
    )
    out: str = option(
        "",
        "folder of this run (default: that of --pretrained with -linear, or runs/NAME-linear)",
        path=True,
    )
    keep: int = option(2, "checkpoints to keep, in addition to the best", at_least=1)
    epochs: int = option(100, "epochs to train", at_least=1, at_most=10**6)
    lr: float = option(math.nan, LINEAR_LR, "--learning-rate", at_least=0.0)  # nan: not given
    schedule: list[int] = option(
        [60, 80], "epochs at which the learning rate falls tenfold", at_least=0, many=True
    )
    warmup_epochs: int = option(0, "epochs over which the learning rate rises", at_least=0)
    weight_decay: float = option(0.0, "weight decay", "--wd", at_least=0.0)

    def __post_init__(self) -> None:
        convert_lists(self)
        if self.knn and self.evaluate:
            raise RunError("--knn and --evaluate: expected one of them. Leave out one")
        if self.knn and self.resume not in ("", "auto"):
            raise RunError(
                f"--resume {self.resume}: no effect with --knn, which has no classifier. "
                "Give the checkpoint to --pretrained"
            )
        if math.isnan(self.lr):
            object.__setattr__(self, "lr", LARS_RATE * self.batch_size / 256 if self.lars else 30.0)

    def folder(self) -> str:
        """The run's folder."""
        folder, file = os.path.split(self.pretrained)
        if os.path.isfile(os.path.join(folder, "config.yaml")):  # a run's
            return self.out or f"{folder}-linear"
        name = file.split(".")[0] or file_name(self.arch or "resnet18")
        return self.out or os.path.join("runs", f"{name}-linear")


def read_config(argv: list[str], program: str = "job.train", kind: type = Config) -> Any:
    """Return the options of a program, a `kind`. RunError: one is unknown or out of range."""
    for argument in argv:
        if (name := argument.split("=")[0]) in RETIRED:
            raise RunError(f"{name}: not an option of this program; {RETIRED[name]}")
    config, given = cli.read(program, kind, argv)
    if config.cos and "schedule" in given:
        raise RunError(
            f"{shown('schedule', config)}: no effect with --cos; leave out one, or add --no-cos"
        )
    if kind is Config:
        check_effects(config, given)
    if kind is LinearConfig:
        for name in RECEIVERS:
            check_receivers(config, flag(name), name in given and getattr(config, name))
        if config.knn_k and not config.knn and "knn_k" in given:
            raise RunError(
                f"--knn-k {config.knn_k}: no effect without --knn; leave it out, or add --knn"
            )
    return config


def check_effects(config: Config, given: set[str]) -> None:
    """RunError: an option of the command line has no effect. Options of files can have none."""
    if config.loss_share and "loss_factor" in given:
        raise RunError(
            f"{shown('loss_factor', config)}: no effect with --loss-share {config.loss_share:g}, "
            "which computes the factor; leave out one"
        )
    if config.matching == "random" and "refresh_epochs" in given:
        raise RunError(
            f"{shown('refresh_epochs', config)}: no effect with --matching random, which is "
            "never solved; leave out one"
        )
    if config.resume not in ("", "auto"):  # a teacher's file there becomes --teacher
        config = replace(config, teacher=config.teacher or config.resume)
    default, unused = type(config)(), refused_options(config)
    for name in sorted(given & unused.keys()):
        if getattr(config, name) != getattr(default, name):
            raise RunError(f"{shown(name, config)}: no effect {unused[name]}")


def unused_options(config: Config | LinearConfig) -> set[str]:
    """Return the options that have no effect with the others."""
    unused = {"schedule"} if config.cos else set()
    if isinstance(config, LinearConfig):
        unused |= set() if config.knn else {"knn_k"}
        return unused | (set() if config.arch in ("", *ARCHS) else {"stem", "width"})
    unused |= {"loss_factor"} if config.loss_share else set()
    unused |= {"refresh_epochs"} if config.matching == "random" else set()
    return unused | refused_options(config).keys()


def shown(name: str, config: Config) -> str:
    """Return an option as on a command line: --moco-k 5."""
    return " ".join(words_of(name, getattr(config, name)))


def check_receivers(config: LinearConfig, receiver: str, given: object) -> None:
    """RunError: the run computes an accuracy only, and writes no records to a receiver.

    receiver: its option, for the error. given: its value, false if it is not used.
    """
    accuracy_only = "--knn" if config.knn else "--evaluate" if config.evaluate else ""
    if given and accuracy_only:
        reason = f"no effect with {accuracy_only}, which writes no records"
        raise RunError(f"{receiver}: {reason}; leave out one")
