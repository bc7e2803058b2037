"""The options that belong neither to a framework nor to a distiller, in groups."""

from dataclasses import dataclass

from job.declare import did_you_mean, option
from job.errors import RunError
from job.networks import ARCHS, STEMS, WIDTH, WIDTHS, check_name
from job.schedules import RateOptions, parse_save_every

NETWORK = "network; also timm/NAME, and package.module:function"
STUDENT_WIDTH = "channels of the student's first stage; later stages have 2, 4 and 8 times as many"
KNN_K = "training images that vote in k-NN (0: 200, or the mean size of a class if less)"
HEAD_WIDTH = (
    "hidden width of the student's heads: MoCo's MLP, SimSiam's projector, distillers' "
    "(0: as published; for a framework, the backbone's width)"
)
DATA = (
    "folder of images, with or without train/<class>/*; a text file with a path a line; or the "
    "word digits: scikit-learn's digits, written to data/digits"
)
MORE_DATA = "further folders or text files, whose images are added"
LOG_TO = "send the curves also to wandb, mlflow or module:name (job/metrics/README.md)"
# Names of --log-to, in addition to the user's own.
TRACKERS = {"wandb": "job.metrics.wandb:WandB", "mlflow": "job.metrics.mlflow:MLflow"}
DETERMINISTIC = "on GPUs, use only operations that repeat to the same bytes (job/engine/README.md)"
COMPILE = "compile the networks: slower start, faster steps (job/README.md)"
PRECISION = "bf16: autocast, for hardware with bf16 (job/README.md)"
LOADERS = "data loading processes of each worker (-1: as many as it has cores; 0: none)"


def check_tracker(name: str, shown: str) -> None:
    """RunError: an unknown tracker, or a name that is not module:name. shown: the option."""
    if name not in TRACKERS and not (":" in name and all(name.split(":", 1))):
        expected = f"expected {', '.join(TRACKERS)} or module:name"
        raise RunError(f"{shown} {name!r}: {expected}{did_you_mean(name, TRACKERS)}")


@dataclass(frozen=True)
class ImageOptions:
    """Images."""

    group = "data"

    data: str = option("", DATA, path=True)
    image_size: int = option(224, "side of the views in pixels", at_least=8, at_most=4096)
    workers: int = option(-1, LOADERS, "-j", at_least=-1, at_most=512)
    max_bad_images: int = option(
        100, "undecodable images that are allowed; with more the run fails", at_least=0
    )


@dataclass(frozen=True)
class DataOptions(ImageOptions):
    """Images of one folder or several."""

    group = "data"

    more_data: list[str] = option([], MORE_DATA, many=True, path=True)

    @property
    def images_from(self) -> list[str]:
        """All folders and lists of images, DIR first."""
        return [self.data, *self.more_data]


@dataclass(frozen=True)
class StepOptions:
    """SGD steps."""

    group = "optimizer"

    batch_size: int = option(256, "images in a step, over all workers together", "-b", at_least=1)
    momentum: float = option(0.9, "momentum of SGD", at_least=0.0, below=1.0)
    weight_decay: float = option(1e-4, "weight decay", "--wd", at_least=0.0)
    precision: str = option("float32", PRECISION, choices=("float32", "bf16"))
    deterministic: bool = option(False, DETERMINISTIC)
    seed: int = option(0, "seed of all random numbers", at_least=0, below=2**63)


@dataclass(frozen=True)
class RunOptions:
    """Folder, log and checkpoints."""

    group = "run"

    config: list[str] = option(
        [], "a YAML file, or a preset's name; can be repeated", many=True, path=True
    )
    out: str = option("", "folder of this run (default: runs/ARCH)", path=True)
    resume: str = option(
        "",
        "auto: resume from the newest checkpoint in --out, if one exists; or a checkpoint's path",
        path=True,
    )
    save_every: str = option(
        "1", "epochs between checkpoints; or steps, as in 500steps", parse=parse_save_every
    )
    keep: int = option(3, "checkpoints to keep", at_least=1)
    check_every: int = option(
        100, "steps between checks that all workers have the same networks", at_least=1
    )
    print_freq: int = option(10, "steps between log lines outside a terminal", "-p", at_least=1)
    tensorboard: bool = option(
        False, "write event files for TensorBoard, to tensorboard/ in the run's folder"
    )
    log_to: list[str] = option([], LOG_TO, many=True, parse=check_tracker)


@dataclass(frozen=True)
class NeighborOptions:
    """k-NN accuracy."""

    group = "knn"

    knn_k: int = option(0, KNN_K, at_least=0)


@dataclass(frozen=True)
class Common(StepOptions, RateOptions, RunOptions, DataOptions):
    """The options of `job.train` and `job.linear`."""


@dataclass(frozen=True)
class StudentOptions:
    """Student network."""

    group = "student"

    arch: str = option(
        "resnet18", f"the student's {NETWORK}", "-a", choices=ARCHS, others=check_name
    )
    stem: str = option(
        "imagenet",
        "first layer of student and teacher; small: for images of about 32 pixels",
        choices=STEMS,
    )
    width: int = option(
        WIDTH, STUDENT_WIDTH, at_least=WIDTHS.start, at_most=WIDTHS[-1], multiple_of=WIDTHS.step
    )
    zero_init_residual: bool = option(
        False, "each residual block starts as the identity, so that a deep network starts shallow"
    )
    head_width: int = option(0, HEAD_WIDTH, at_least=0, at_most=2**14)


@dataclass(frozen=True)
class ViewOptions:
    """Random views."""

    group = "views"

    aug_plus: bool = option(False, "MoCo v2's augmentations")
    weak_views: bool = option(False, "crops and flips only: no changes of colours, no blur")
    augment_on: str = option("cpu", "device for colours, blur and flips", choices=("cpu", "device"))
    crop_min: float = option(
        0.2, "smallest fraction of an image's area that a view shows", above=0.0, at_most=1.0
    )


@dataclass(frozen=True)
class PassOptions:
    """Forward and backward passes."""

    group = "passes"

    accumulate: int = option(
        1, "micro-batches of a worker's batch, one after the other, to save memory", at_least=1
    )
    compile: bool = option(False, COMPILE)
    fp16_allreduce: bool = option(
        False, "sum gradients over the workers in half precision, for slow networks"
    )


@dataclass(frozen=True)
class ProgressOptions(NeighborOptions):
    """k-NN accuracy during training."""

    group = "knn"

    knn_every: int = option(0, "epochs between k-NN accuracies on val/ (0: none)", at_least=0)


@dataclass(frozen=True)
class Options(ProgressOptions, PassOptions, ViewOptions, StudentOptions, Common):
    """The options of `job.train` that every framework and distiller has."""
