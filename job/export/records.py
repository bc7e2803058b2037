"""A checkpoint's training and accuracies, by the records in its folder and job.linear's."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.checkpoints.folder import LAST
from job.checkpoints.foreign import Backbone, read_backbone
from job.config import WITHOUT_EFFECT
from job.errors import RunError
from job.export.origin import folders_of
from job.show.read.files import opened
from job.show.read.history import LONGEST_RECORD, Records

METRICS = "metrics.jsonl"
STEP = b'{"kind": "step"'  # the start of most lines of METRICS, which the card does not need


@dataclass(frozen=True)
class Accuracy:
    """An accuracy in a line of a model card. value: in percent, None if it was not measured.

    name: of the measure. data: name of the images' folder. about: how it was measured, or why not.
    source: the record, with its run.
    """

    name: str
    value: float | None
    about: str
    data: str = ""
    source: str = ""


@dataclass(frozen=True)
class Run:
    """The records of the run that saved a checkpoint, as far as its folder has them.

    start, teacher: the last such records that have the checkpoint's options, or {}.
    unlabelled: a hint reports that no image has a label.
    """

    name: str
    start: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    knn: list[dict[str, Any]] = field(default_factory=list)
    unlabelled: bool = False


def read_records(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return the records of a run's folder by kind, without steps. RunError: it cannot be read."""
    records = Records()
    path = Path(folder, METRICS)
    with contextlib.suppress(FileNotFoundError), opened(path) as file:
        for line in iter(lambda: file.readline(LONGEST_RECORD), b""):
            if not line.startswith(STEP):
                records.add(line)
    return records.others


def read_run(checkpoint: str, config: Mapping[str, Any]) -> Run:
    """Return the run of a checkpoint with these options, from the records in its folder."""
    folder = os.path.dirname(os.path.realpath(checkpoint))
    name, records = os.path.basename(folder), read_records(folder)
    fitting = [start for start in records["start"] if has_options(start["options"], config)]
    if not fitting:
        return Run(name)
    teachers = [each for each in records["teacher"] if each.get("path") == config.get("teacher")]
    unlabelled = any(hint.get("id") == "unlabelled" for hint in records["hint"])
    return Run(name, fitting[-1], (teachers or [{}])[-1], records["knn"], unlabelled)


def has_options(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the options of a record, of those that change results, are a checkpoint's."""
    names = recorded.keys() & config.keys() - WITHOUT_EFFECT
    return bool(names) and all(recorded[name] == config[name] for name in names)


def knn_accuracy(run: Run, weights: Backbone) -> Accuracy:
    """Return the k-NN accuracy of a checkpoint."""
    name, epoch = "k-NN, top-1", weights.meta["epoch"]
    if not run.start or epoch is None:
        return Accuracy(name, None, "the checkpoint's folder has no record of its run")
    if weights.run.get("step"):
        return Accuracy(name, None, "the checkpoint is from within an epoch")
    records = [record for record in run.knn if record["epoch"] == epoch]
    if not records:
        # These are of other weights.
        earlier = [record for record in run.knn if record["epoch"] < epoch][-1:]
        other = "".join(f"; {epochs(each['epoch'])} {each['knn']:.2f} %" for each in earlier)
        return Accuracy(name, None, f"no record {epochs(epoch)}{other}")
    record = records[-1]
    about = [f"of {record['knn_images']:.0f} images"] if "knn_images" in record else []
    about += [f"k = {record['knn_k']:.0f}"] if "knn_k" in record else []
    about += [epochs(epoch)]
    data = folders_of(run.start["options"])
    source = f"kind knn in {METRICS} of the run {run.name}"
    return Accuracy(name, record["knn"], ", ".join(about), data, source)


def linear_accuracies(checkpoint: str, weights: Backbone) -> list[Accuracy]:
    """Return the accuracies of a linear classifier on a checkpoint's features.

    They count if a checkpoint of the classifier has the same frozen tensors.
    """
    name = "linear classifier, top-1"
    folders = linear_folders(checkpoint, weights)
    folder = next((each for each in folders if os.path.isfile(os.path.join(each, METRICS))), "")
    if not folder:
        return [Accuracy(name, None, f"no run {os.path.basename(folders[0])} next to its folder")]
    run = os.path.basename(folder)
    if problem := differs(folder, weights):
        return [Accuracy(name, None, f"the run {run} {problem}")]
    records = read_records(folder)
    validations = records["validation"]
    options = (records["start"] or [{"options": {}}])[-1]["options"]
    if not validations:
        return [Accuracy(name, None, f"the run {run} has no record of an accuracy")]
    data, source = folders_of(options), f"kind validation in {METRICS} of {run}"
    last, best = validations[-1], max(validations, key=lambda record: record["val_top1"])
    of = f" of {options['epochs']}" if "epochs" in options else ""
    images = f"of {last['val_images']:.0f} images, " if "val_images" in last else ""
    after = images + epochs(last["epoch"] + 1) + of
    about = f"{after}; best {epochs(best['epoch'] + 1)}: {best['val_top1']:.2f} %"
    accuracies = [Accuracy(name, last["val_top1"], about, data, source)]
    if "val_top5" in last:
        top5 = Accuracy("linear classifier, top-5", last["val_top5"], after, data, source)
        accuracies.append(top5)
    return accuracies


def linear_folders(checkpoint: str, weights: Backbone) -> list[str]:
    """Return the folders where `job.linear` has records for a checkpoint, or has saved it."""
    paths = os.path.abspath(checkpoint), os.path.realpath(checkpoint)
    given, real = map(os.path.dirname, paths)
    if "pretrained" in weights.meta["config"]:
        return [real]
    return [f"{given}-linear", f"{real}-linear"]


def differs(folder: str, weights: Backbone) -> str:
    """Return why a classifier's accuracy does not apply to these weights, or ""."""
    try:
        frozen = read_backbone(os.path.join(folder, LAST))
    except RunError as error:
        return f"has no checkpoint that can be compared: {error}"
    return "" if frozen.digest == weights.digest else "has other frozen weights"


def epochs(number: float) -> str:
    """Return the time of a measurement, as text."""
    return f"after {number:.0f} epoch{'' if number == 1 else 's'}"
