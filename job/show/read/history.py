"""Read a run's folder: options, records of metrics.jsonl, and names of checkpoints."""

import array
import collections
import contextlib
import dataclasses
import datetime
import io
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from job.errors import RunError
from job.metrics.schema import COURSE, EARLIER, KINDS, kind_of
from job.show.read.files import LARGEST_TEXT, opened
from job.yaml_files import LONGEST_FILE, pairs

STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")
DECLARED = {kind: get_type_hints(fields) for kind, fields in KINDS.items()}  # {kind: {field: type}}
REQUIRED: dict[str, frozenset[str]] = {
    kind: fields.__required_keys__  # type: ignore[attr-defined]
    for kind, fields in KINDS.items()
}
PUBLISHED = 64  # as job.networks.WIDTH, whose module imports torch, which takes seconds
LONGEST_RECORD = 2**20  # bytes of a line of metrics.jsonl
LONGEST_LINE = 2000  # characters of a line of log.txt
MOST_COLUMNS = 200  # numbers of a step
STAGES = range(1, 10)
CHECKPOINT = re.compile(r"checkpoint_(\d+)_(\d+)\.pth\.tar")  # epochs done, steps of the next


class NoAliases(yaml.SafeLoader):
    """Read YAML without aliases: they turn a small file into a large value.

    No program of this project writes them.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. YAMLError: it is an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


class Columns:
    """Records as one array for each number.

    For a million steps, this needs a few hundred MB less than a list of records.
    """

    def __init__(self) -> None:
        self.length = 0
        self.columns: dict[str, array.array] = collections.defaultdict(lambda: array.array("d"))

    def add(self, record: dict[str, float]) -> None:
        """Add a record. A number that a record lacks is NaN."""
        for name, value in record.items():
            if name not in self.columns and len(self.columns) == MOST_COLUMNS:
                continue
            column = self.columns[name]
            column.extend([math.nan] * (self.length - len(column)))
            column.append(value)
        self.length += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Return {name: (n,) float64} of n records."""
        for column in self.columns.values():
            column.extend([math.nan] * (self.length - len(column)))
        return {name: np.array(column) for name, column in self.columns.items()}


class Records:
    """The records of a metrics.jsonl by kind, and the number of its damaged lines."""

    def __init__(self) -> None:
        self.steps, self.damaged = Columns(), 0
        self.others: dict[str, list[dict[str, Any]]] = {
            kind: [] for kind in KINDS if kind != "step"
        }
        self.warnings: list[str] = []

    def add(self, line: bytes) -> None:
        """Add a line. A damaged one without a line end is not counted: it is being written."""
        if parsed := read_record(line):
            kind, record = parsed
            if kind == "step":
                self.steps.add(record)
            elif kind:
                self.others[kind].append(record)
            if text := warning_of(kind, record):
                self.warnings.append(text)
        elif line.endswith(b"\n"):
            self.damaged += 1

    def __bool__(self) -> bool:
        return bool(self.steps.length or any(self.others.values()))


@dataclasses.dataclass(frozen=True)
class History:
    """A finished, running or interrupted run, as its folder shows it.

    options: of the last start, or of config.yaml. losses: the framework's losses in `steps`.
    steps: {name: (n,) float64}, a column for each number of the n steps ("steps", "epoch", "step",
        "loss", "lr", "images_per_s", "data_wait", in percent "accuracy" or "top1", ...); NaN where
        a step lacks it.
    refreshes: one record for each distiller, stage and refresh. factors, knn, signs, validation,
        changes: records as in metrics.jsonl, in their order.
    warnings: also hints and errors. checkpoints: oldest first.
    complete: the content of the run's file `complete`, or None if the run is not done.
    damaged: number of damaged lines of metrics.jsonl, without a last one that is being written.
    """

    folder: Path
    options: dict[str, Any]
    losses: list[str]
    steps: dict[str, np.ndarray]
    refreshes: list[dict[str, Any]]
    factors: list[dict[str, Any]]
    knn: list[dict[str, float]]
    signs: list[dict[str, float]]
    validation: list[dict[str, float]]
    changes: list[dict[str, float]]
    warnings: list[str]
    checkpoints: list[Path]
    complete: str | None
    damaged: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def kind(self) -> str:
        """The run's program: "linear" or "train"."""
        return (
            "linear"
            if "pretrained" in self.options or "top1" in self.steps or self.validation
            else "train"
        )

    def in_force(self, name: str, now: float, epochs: np.ndarray) -> np.ndarray:
        """Return "batch_size" or "steps_an_epoch" in each of `epochs` (n,), as (n,) float64.

        now: its value since the last change.
        """
        values = np.full(len(epochs), float(now))
        for change in reversed(self.changes):
            values[epochs < change["epoch"]] = change[f"{name}_before"]
        return values


def read_run(folder: str | Path) -> History:
    """Read a run's folder.

    RunError: it is missing, holds no run, or has an unreadable file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; expected a run's folder. Give its --out")
    records = Records()
    read_records(folder / "metrics.jsonl", records)
    starts = records.others["start"]
    options = options_of(starts[-1]) if starts else read(folder / "config.yaml", read_options, {})
    if not (options or records):
        raise RunError(
            f"{folder} holds no run: config.yaml and metrics.jsonl are missing or empty. "
            "Give a run's --out"
        )
    steps = records.steps.arrays()
    return History(
        folder=folder,
        options=options,
        losses=losses_of(starts[-1] if starts else {}, steps),
        steps=steps,
        refreshes=records.others["refresh"],
        factors=records.others["factor"],
        knn=records.others["knn"],
        signs=records.others["collapse"],
        validation=records.others["validation"],
        changes=records.others["change"],
        warnings=records.warnings,
        checkpoints=find_checkpoints(folder),
        complete=read(folder / "complete", lambda text: text.strip() or "done", None),
        damaged=records.damaged,
    )


def read_records(path: Path, records: Records) -> None:
    """Read a metrics.jsonl, if it exists. RunError: it cannot be read."""
    with contextlib.suppress(FileNotFoundError), opened(path) as file:
        for line in iter(lambda: file.readline(LONGEST_RECORD), b""):
            records.add(line)


def read(path: Path, parse: Callable[[str], Any], otherwise: Any) -> Any:
    """Return `parse` of a file's text, or `otherwise` if it is missing.

    RunError: it cannot be read.
    """
    try:
        with opened(path, LARGEST_TEXT) as file:
            return parse(io.TextIOWrapper(file, "utf-8", "backslashreplace").read())
    except FileNotFoundError:
        return otherwise


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, oldest first."""
    named = ((CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint_*"))
    return [
        path
        for *_, path in sorted(
            (int(match[1]), int(match[2]), path) for match, path in named if match
        )
    ]


def read_options(text: str) -> dict[str, Any]:
    """Return the options of a config.yaml, or {} if it is damaged.

    The run's numbers can be shown without them.
    """
    if len(text) > LONGEST_FILE:
        return {}
    try:
        loader = NoAliases(text)
        nodes = dict(pairs(loader.get_single_node(), "config.yaml"))
        options = {name: loader.construct_object(node, deep=True) for name, node in nodes.items()}
    # ValueError: an invalid day, or too many digits. LookupError, AttributeError: a tag in PyYAML.
    except (RunError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        return {}
    return {name: value for name, value in options.items() if is_option(value)}


def options_of(start: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a record of kind start."""
    return {name: value for name, value in start["options"].items() if is_option(value)}


def losses_of(start: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Return the framework's losses among the names of a step's numbers.

    start: the record of the last start, or {} for a run of an earlier version.
    """
    return [
        name for name in dict.fromkeys((EARLIER["start"] | dict(start))["losses"]) if name in names
    ]


def is_option(value: object) -> bool:
    """Return whether a program may have written this value of an option."""
    if isinstance(value, list):
        return all(map(is_option, value))
    return isinstance(value, str | bool | None) or is_number(value)


def network(options: dict[str, Any]) -> str:
    """Return a run's network as text, "" if it has no name.

    Examples: resnet18, or resnet18 of width 16 if that is not the published width.
    """
    arch, width = options.get("arch"), options.get("width", PUBLISHED)
    return f"{arch} of width {width}" if arch and width != PUBLISHED else str(arch or "")


def read_record(line: str | bytes) -> tuple[str, dict[str, Any]] | None:
    """Return the kind and the fields of a line of metrics.jsonl, or None if the line is damaged.

    The kind is "" if it is unknown.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    kind, given = kind_of(record), record.pop("kind", "")
    if given and not kind:
        return "", {}  # of a later version
    if not is_sound(kind, record) or record.get("stage", 1) not in STAGES:
        return None
    return kind, EARLIER.get(kind, {}) | record


def is_sound(kind: str, record: dict[str, Any]) -> bool:
    """Return whether a record has its kind's required fields, all of the declared types.

    In records of COURSE, or without a kind, the other fields must be numbers.
    """
    declared: dict[str, Any] = DECLARED.get(kind, {})
    other = float if kind in COURSE or not kind else object
    complete = record.keys() >= REQUIRED.get(kind, frozenset())
    return complete and all(
        is_of(value, declared.get(name, other)) for name, value in record.items()
    )


def is_of(value: object, expected: Any) -> bool:
    """Return whether a record's value has a type of the schema."""
    if expected in (int, float):
        return is_number(value) and isinstance(value, int | expected)
    if get_origin(expected) is list:
        return isinstance(value, list) and all(is_of(item, get_args(expected)[0]) for item in value)
    return isinstance(value, get_origin(expected) or expected)


def warning_of(kind: str, record: dict[str, Any]) -> str:
    """Return the line of a hint, a warning or an end by an error, and "" for other records."""
    if kind == "end" and record["how"] == "error":
        kind = "error"
    return (
        f"{kind}: {record['text']}"[:LONGEST_LINE] if kind in ("hint", "warning", "error") else ""
    )


def is_number(value: object) -> bool:
    """Return whether this is a number that a column can store."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def read_lines(text: str) -> list[tuple[float, str]]:
    """Return the lines of a log.txt with their times, seconds since 1970."""
    lines = []
    for match in filter(None, map(STAMP.fullmatch, text.split("\n"))):
        try:
            lines.append(
                (datetime.datetime.fromisoformat(match[1]).timestamp(), match[2][:LONGEST_LINE])
            )
        except (ValueError, OverflowError):
            continue
    return lines


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the means (n,) of the last `width` of (n,) values, fewer at the start, without NaN."""
    width = max(1, min(width, len(values)))
    counted = np.isfinite(values)
    sums = np.cumsum(np.concatenate([np.zeros(1), np.where(counted, values, 0.0)]))
    counts = np.cumsum(np.concatenate([np.zeros(1), counted]))
    starts = np.maximum(np.arange(len(values)) + 1 - width, 0)
    ends = np.arange(len(values)) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])
