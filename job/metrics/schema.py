"""The kinds of records in metrics.jsonl, and their fields.

A record is one line of JSON with its `kind` and the fields of that kind. It can have other fields.
In records of COURSE these are numbers.

COURSE: results of the computation. A run that resumes before such a record drops it and computes it
again, with the same values except for times. `epoch` and `step` count from 0. `steps` is the number
of optimizer steps since the run's start.
PROCESS: events of the run's processes. These records stay. `time`: seconds since 1970.
JOB: events of a SLURM job. slurm/functions.sh prints these records in the job's log.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, TypedDict


class Step(TypedDict):
    """A training step: its losses and accuracies over all workers, accuracies in percent."""

    steps: int
    epoch: int
    step: int
    loss: float
    lr: NotRequired[float]
    images_per_s: NotRequired[float]  # of all workers
    data_wait: NotRequired[float]  # fraction of the step's time in which rank 0 waited for images


class Refresh(TypedDict):
    """A stage's new matching, from the refresh before `step`."""

    epoch: int
    step: int
    distiller: NotRequired[str]
    stage: int
    changed: float  # fraction of the student's channels
    groups: NotRequired[int]
    channels: NotRequired[int]
    cost_before: NotRequired[float]  # mean cost of a matched pair
    cost_after: NotRequired[float]
    measuring: NotRequired[float]  # s, all stages together, like the next two
    gathering: NotRequired[float]
    solving: NotRequired[float]


class Factor(TypedDict):
    """The loss factor of a distiller, computed from --loss-share."""

    epoch: int
    step: int
    distiller: NotRequired[str]
    loss_factor: float
    raw_distillation: NotRequired[float]  # loss of an image at a factor of 1
    measuring: NotRequired[float]  # s


class Knn(TypedDict):
    """A k-NN accuracy after `epoch` epochs."""

    epoch: int
    knn: float  # percent
    knn_auc: NotRequired[float]  # of the features' singular values (job/metrics/collapse.py)
    knn_k: NotRequired[int]
    knn_images: NotRequired[int]
    knn_seconds: NotRequired[float]


class Collapse(TypedDict):
    """The signs of collapse after a step (job/metrics/collapse.py)."""

    steps: int
    epoch: int
    step: int
    feature_std: float


class Validation(TypedDict):
    """A classifier's accuracies in percent after the epoch `epoch`."""

    epoch: int
    val_top1: float
    val_top5: NotRequired[float]
    val_loss: NotRequired[float]
    val_images: NotRequired[int]
    val_seconds: NotRequired[float]


class Change(TypedDict):
    """A resume with another batch size or number of steps in an epoch."""

    epoch: int
    steps_an_epoch: int
    steps_an_epoch_before: int
    batch_size_before: int
    batch_size: int


class Start(TypedDict):
    """The start of a process's training, from the first step or from a checkpoint."""

    time: float
    epoch: int
    step: int
    options: dict[str, Any]
    workers: int
    nodes: int
    images: int
    labelled: NotRequired[int]  # images with a label
    steps_an_epoch: int
    losses: NotRequired[list[str]]  # names of the framework's losses in the records of steps
    launcher: NotRequired[str]
    network: NotRequired[str]
    nccl: NotRequired[str]  # NCCL's network between nodes, or ""
    device: NotRequired[str]
    versions: NotRequired[str]
    container: NotRequired[str]  # the container's image, or "none"


class Teacher(TypedDict):
    """The teacher of a process, before its `start`."""

    time: float
    arch: str
    path: NotRequired[str]


class Resumed(TypedDict):
    """The checkpoint that a process has resumed from."""

    time: float
    epoch: int
    step: int
    workers: NotRequired[int]  # of the process that saved it
    later: NotRequired[list[str]]  # names of later checkpoints, which the resume ignores


class Saved(TypedDict):
    """A saved checkpoint, after `epoch` epochs and `step` steps of the next."""

    time: float
    epoch: int
    step: int
    path: str
    seconds: float


class Remark(TypedDict):
    """A hint or a warning. The id is stable, but the text can change.

    Hints: stuck (MoCo, SimSiam), solved (MoCo), collapsed (SimSiam), weak, pull, wait,
    unlabelled (no image has a label), other_split (a folder such as test/ is trained on),
    same_folder (two classes are one folder).
    Warnings: long_queue, queue_rank (MoCo), unsynchronised (SimSiam), long_similarity_queue,
    same_features, dead_channels (any framework), rate_jump, ramp_jump (a resume),
    slow_images, stalled_worker, standard_output, event_files, callback, unused_head_width,
    nccl_network.
    """

    time: float
    id: NotRequired[str]
    text: str


class Undecodable(TypedDict):
    """An undecodable file, which the run skips."""

    time: float
    text: str


class End(TypedDict):
    """The end of a process. how: complete, stopped (by a signal) or error."""

    time: float
    how: str
    id: NotRequired[str]  # of an error: stalled_worker
    text: str
    code: int  # exit code of the program


class Try(TypedDict):
    """A start of a job, from its first step or after a requeue."""

    time: float
    number: int  # from 1
    nodes: str
    run: str  # folder


class Decision(TypedDict):
    """Whether a job is requeued."""

    time: float
    reason: str  # one of those in `sentence` of slurm/functions.sh
    status: NotRequired[int]  # exit status of the tasks


COURSE: dict[str, type] = {
    "step": Step,
    "refresh": Refresh,
    "factor": Factor,
    "knn": Knn,
    "collapse": Collapse,
    "validation": Validation,
    "change": Change,
}
PROCESS: dict[str, type] = {
    "start": Start,
    "teacher": Teacher,
    "resumed": Resumed,
    "saved": Saved,
    "hint": Remark,
    "warning": Remark,
    "undecodable": Undecodable,
    "end": End,
}
JOB: dict[str, type] = {"try": Try, "decision": Decision}
KINDS = COURSE | PROCESS | JOB
# The kinds of records without a kind, of earlier versions, by the first field that they have.
FIELDS = {
    "stage": "refresh",
    "knn": "knn",
    "feature_std": "collapse",
    "val_top1": "validation",
    "loss": "step",
}
FIELDS |= {"batch_size": "change", "loss_factor": "factor"}
# Fields missing in records of earlier versions, and their values there.
EARLIER: dict[str, dict[str, Any]] = {kind: {"distiller": "mgd"} for kind in ("refresh", "factor")}
EARLIER |= {"start": {"losses": ["contrastive"]}}


# Losses that can be negative. A ratio uses their range instead.
RANGE = {"cosine": 1.0}


def kind_of(record: Mapping[str, Any]) -> str:
    """Return a record's kind, or "" if it is unknown."""
    kind = record.get("kind") or next(
        (kind for field, kind in FIELDS.items() if field in record), ""
    )
    return kind if isinstance(kind, str) and kind in KINDS else ""


def own_size(step: Mapping[str, Any], losses: Iterable[str]) -> Any:
    """Return the divisor of a distillation loss in the ratio: the sum of `losses`.

    step: the numbers of a step, or arrays of the numbers of several steps. losses: names of the
    framework's losses.
    """
    sizes = []
    for name in losses:
        value = step.get(name, 0.0)
        sizes.append(RANGE[name] + 0 * value if name in RANGE else value)
    return sum(sizes[1:], sizes[0]) if sizes else 0.0


def ratio(step: Mapping[str, float], losses: Iterable[str]) -> float | None:
    """Return a step's distillation loss divided by `own_size`, or None if either is 0."""
    own = own_size(step, losses)
    distillation = step.get("distillation", 0.0)
    return distillation / own if own and distillation else None
