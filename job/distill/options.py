"""The options of a teacher and of all distillers."""

from dataclasses import dataclass

from job.declare import option
from job.evaluate.tables import FORMATS, ending
from job.networks import ARCHS, check_name
from job.options import NETWORK, Options

LOSS_FACTOR = "divisor of the distillation loss (default: computed from --loss-share; "
LOSS_FACTOR += "overrides it if given)"
LOSS_SHARE = (
    "initial distillation loss as a multiple of the framework's reference loss, ln(K + 1) with "
    "MoCo; the run computes the factor from it (0: use --loss-factor)"
)
TEACHER = (
    "checkpoint of the teacher, or hub:NAME, or a .npy file of its features by job.embed; without "
    "a teacher there is no distillation"
)
TEACHER_ARCH = f"the teacher's {NETWORK} (default: detected from its file)"
TEACHER_SIZE = (
    "side in pixels to which the teacher's images are resized; not for torchvision's ResNets "
    "(0: as the network demands, else the student's)"
)
WEIGHTS = "weights of the losses of --distill, whose sum starts at --loss-share "
WEIGHTS += "(default: 1 each)"
LOSS_RAMP = "decrease the distillation loss linearly to 0 at the run's last step"


@dataclass(frozen=True)
class DistillOptions(Options):
    """Teacher and distillation."""

    group = "teacher"

    teacher: str = option("", TEACHER, path=True)
    teacher_arch: str = option("", TEACHER_ARCH, choices=("", *ARCHS), others=check_name)
    teacher_size: int = option(0, TEACHER_SIZE, at_least=0, at_most=4096)
    loss_factor: float = option(1e4, LOSS_FACTOR, above=0.0, instead_of="loss_share")
    loss_share: float = option(10.0, LOSS_SHARE, at_least=0.0)
    distill_weights: list[float] = option([], WEIGHTS, at_least=0.0, many=True)
    loss_ramp: bool = option(False, LOSS_RAMP)


def is_feature_file(teacher: str) -> bool:
    """Return whether --teacher is a file of features, by its ending."""
    return ending(teacher) in FORMATS
