"""Read a run's folder: its options, its records of steps, refreshes, accuracies and warnings, its checkpoints."""

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
PUBLISHED = 64  # job.networks.WIDTH, without torch, which would take mgd-watch seconds
LONGEST_RECORD = 2**20  # bytes of a line of metrics.jsonl
LONGEST_LINE = 2000  # characters of a line of log.txt
MOST_COLUMNS = 200  # numbers that a step has
STAGES = range(1, 10)
CHECKPOINT = re.compile(r"checkpoint_(\d+)_(\d+)\.pth\.tar")  # epochs and steps that are done


class NoAliases(yaml.SafeLoader):
    """Reads YAML without aliases, by which a small file becomes a large value. No program writes them."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. YAMLError: it is an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


class Columns:
    """Records, a column a number: of a million steps a few hundred MB less than as they are."""

    def __init__(self) -> None:
        self.length = 0
        self.columns: dict[str, array.array] = collections.defaultdict(lambda: array.array("d"))

    def add(self, record: dict[str, float]) -> None:
        """Take in a record; numbers that it lacks, or that those before lacked, are NaN."""
        for name, value in record.items():
            if name not in self.columns and len(self.columns) == MOST_COLUMNS:
                continue
            column = self.columns[name]
            column.extend([math.nan] * (self.length - len(column)))
            column.append(value)
        self.length += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """{name: (n,)} of n records."""
        for column in self.columns.values():
            column.extend([math.nan] * (self.length - len(column)))
        return {name: np.array(column) for name, column in self.columns.items()}


class Records:
    """The records of a metrics.jsonl by their kind, and the number of its damaged lines."""

    def __init__(self) -> None:
        self.steps, self.damaged = Columns(), 0
        self.others: dict[str, list[dict[str, Any]]] = {
            kind: [] for kind in KINDS if kind != "step"
        }
        self.warnings: list[str] = []

    def add(self, line: bytes) -> None:
        """Take in a line; a last one without an end is being written."""
        if found := read_record(line):
            kind, record = found
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
    """A run, finished, going on or broken off, as far as its folder tells.

    options: of the last start, or config.yaml. losses: names of the framework's losses in `steps`.
    steps: {name: (n,) float64}, a column for each number that steps have ("steps", "epoch", "step", "loss", "lr",
        "images_per_s", "data_wait", in percent "accuracy" or "top1", ...), NaN where a step lacks it.
    refreshes: a record a distiller, stage and refresh; factors, knn, signs, validation, changes:
        records as metrics.jsonl has them, in their order.
    warnings: also hints and errors. checkpoints: oldest first. complete: the run's last line, if it is done.
    damaged: lines of metrics.jsonl that could not be read, but for a last one that is being written.
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
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def kind(self) -> str:
        """The program whose run it is: "linear" or "train"."""
        return (
            "linear"
            if "pretrained" in self.options or "top1" in self.steps or self.validation
            else "train"
        )

    def in_force(self, name: str, now: float, epochs: np.ndarray) -> np.ndarray:
        """Return "batch_size" or "steps_an_epoch" in each of `epochs` (n,), given its value `now`."""
        values = np.full(len(epochs), float(now))
        for change in reversed(self.changes):
            values[epochs < change["epoch"]] = change[f"{name}_before"]
        return values


def read_run(folder: str | Path) -> History:
    """Read a run's folder. RunError: it is none, holds no run, or one of its files cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give the folder of a run, its --out")
    records = Records()
    read_records(folder / "metrics.jsonl", records)
    starts = records.others["start"]
    options = options_of(starts[-1]) if starts else read(folder / "config.yaml", read_options, {})
    if not (options or records):
        raise RunError(
            f"{folder} holds no run: config.yaml and metrics.jsonl are missing or empty; give a run's --out"
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
    """Read a metrics.jsonl, if there is one. RunError: it cannot be read."""
    with contextlib.suppress(FileNotFoundError), opened(path) as file:
        for line in iter(lambda: file.readline(LONGEST_RECORD), b""):
            records.add(line)


def read(path: Path, parse: Callable[[str], Any], otherwise: Any) -> Any:
    """What `parse` makes of a file's text, or `otherwise` without such a file. RunError: it cannot be read."""
    try:
        with opened(path, LARGEST_TEXT) as file:
            return parse(io.TextIOWrapper(file, "utf-8", "backslashreplace").read())
    except FileNotFoundError:
        return otherwise


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    found = ((CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint_*"))
    return [
        path
        for *_, path in sorted(
            (int(match[1]), int(match[2]), path) for match, path in found if match
        )
    ]


def read_options(text: str) -> dict[str, Any]:
    """The options of a config.yaml; {} if it is damaged, because the numbers can be shown without them."""
    if len(text) > LONGEST_FILE:
        return {}
    try:
        loader = NoAliases(text)
        nodes = dict(pairs(loader.get_single_node(), "config.yaml"))
        options = {name: loader.construct_object(node, deep=True) for name, node in nodes.items()}
    # ValueError: a day that does not exist, too many digits. LookupError, AttributeError: PyYAML's, of tags.
    except (RunError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        return {}
    return {name: value for name, value in options.items() if is_option(value)}


def options_of(start: dict[str, Any]) -> dict[str, Any]:
    """The options of a record of kind start."""
    return {name: value for name, value in start["options"].items() if is_option(value)}


def losses_of(start: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Return the names of the framework's losses among those of a step's numbers.

    start: the record of the last start; {} in a run of an earlier version.
    """
    return [
        name for name in dict.fromkeys((EARLIER["start"] | dict(start))["losses"]) if name in names
    ]


def is_option(value: object) -> bool:
    """Whether a program may have written this value of an option."""
    if isinstance(value, list):
        return all(map(is_option, value))
    return isinstance(value, str | bool | None) or is_number(value)


def network(options: dict[str, Any]) -> str:
    """A run's network in words: resnet18, or resnet18 of width 16 where that is not as published; "" where it has no name."""
    arch, width = options.get("arch"), options.get("width", PUBLISHED)
    return f"{arch} of width {width}" if arch and width != PUBLISHED else str(arch or "")


def read_record(line: str | bytes) -> tuple[str, dict[str, Any]] | None:
    """The kind of a line of metrics.jsonl, "" if it is unknown, and its fields; None if the line is damaged."""
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
    """Whether a record has the required fields of its kind, and all its fields the declared types.

    The other fields of a record of the course, or of no kind, are numbers.
    """
    declared: dict[str, Any] = DECLARED.get(kind, {})
    other = float if kind in COURSE or not kind else object
    complete = record.keys() >= REQUIRED.get(kind, frozenset())
    return complete and all(
        is_of(value, declared.get(name, other)) for name, value in record.items()
    )


def is_of(value: object, expected: Any) -> bool:
    """Whether a record's value is of a type that the schema names."""
    if expected in (int, float):
        return is_number(value) and isinstance(value, int | expected)
    if get_origin(expected) is list:
        return isinstance(value, list) and all(is_of(item, get_args(expected)[0]) for item in value)
    return isinstance(value, get_origin(expected) or expected)


def warning_of(kind: str, record: dict[str, Any]) -> str:
    """Return a record in a line if it is a hint, a warning, or an end by an error; otherwise nothing."""
    if kind == "end" and record["how"] == "error":
        kind = "error"
    return (
        f"{kind}: {record['text']}"[:LONGEST_LINE] if kind in ("hint", "warning", "error") else ""
    )


def is_number(value: object) -> bool:
    """Whether this is a number that a column has room for."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def read_lines(text: str) -> list[tuple[float, str]]:
    """The lines of a log.txt with their times in seconds."""
    found = filter(None, map(STAMP.fullmatch, text.split("\n")))
    lines = []
    for match in found:
        try:
            lines.append(
                (datetime.datetime.fromisoformat(match[1]).timestamp(), match[2][:LONGEST_LINE])
            )
        except (ValueError, OverflowError):
            continue
    return lines


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The running means (n,) of (n,) values over `width` of them, fewer at the beginning; NaN do not count."""
    width = max(1, min(width, len(values)))
    counted = np.isfinite(values)
    sums = np.cumsum(np.concatenate([np.zeros(1), np.where(counted, values, 0.0)]))
    counts = np.cumsum(np.concatenate([np.zeros(1), counted]))
    starts = np.maximum(np.arange(len(values)) + 1 - width, 0)
    ends = np.arange(len(values)) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])
