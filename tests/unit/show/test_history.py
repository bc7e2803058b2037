"""The history of a run's folder: complete, damaged or empty."""

import json

import numpy as np
import pytest

from job.errors import RunError
from job.show.read.history import (
    PUBLISHED,
    Columns,
    Records,
    find_checkpoints,
    network,
    read_lines,
    read_options,
    read_run,
    smooth,
)
from job.networks import WIDTH


def jsonl(*records):
    """Return records as lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def write_run(folder, steps=3, extra=""):
    """Write a run whose steps have no kinds, and lines `extra` after them. Return its folder."""
    records = [
        {"steps": n + 1, "epoch": 0, "step": n, "loss": 5.0 - n, "images_per_s": 10.0}
        for n in range(steps)
    ]
    records += [
        {"epoch": 0, "step": 0, "stage": 1, "changed": 0.5},
        {"steps": 0, "epoch": 1, "step": 0, "knn": 70.0},
    ]
    records += [
        {"kind": "warning", "time": 1.8e9, "text": "slow"},
        {"kind": "end", "time": 1.8e9, "how": "error", "text": "no disk", "code": 2},
    ]
    (folder / "metrics.jsonl").write_text(jsonl(*records) + extra)
    (folder / "config.yaml").write_text("arch: resnet18\nepochs: 2\n")
    return folder


def test_records_without_kinds_are_sorted(tmp_path):
    run = read_run(write_run(tmp_path))
    assert run.steps["loss"].tolist() == [5.0, 4.0, 3.0]
    assert [record["changed"] for record in run.refreshes] == [0.5]
    assert [record["knn"] for record in run.knn] == [70.0]
    assert run.warnings == ["warning: slow", "error: no disk"]
    assert run.kind == "train" and run.complete is None and run.damaged == 0


def test_damaged_counts_all_but_an_unfinished_line(tmp_path):
    lines = ["not json", '{"loss": "high"}', f'{{"loss": 1{"0" * 400}}}', "[1]", '{"loss": 1.']
    run = read_run(write_run(tmp_path, extra="\n".join(lines)))
    assert run.damaged == 4 and len(run.steps["loss"]) == 3


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00\x85garbage\n"])
def test_folder_without_a_run_is_one_line(tmp_path, content):
    if content is not None:
        for name in ("metrics.jsonl", "config.yaml", "log.txt"):
            (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match="holds no run") as raised:
        read_run(tmp_path)
    assert raised.value.code == 2 and str(tmp_path) in str(raised.value)


def test_checkpoints_are_in_numeric_order(tmp_path):
    names = [
        "checkpoint_9999_000000.pth.tar",
        "checkpoint_9999_000002.pth.tar",
        "checkpoint_10000_000000.pth.tar",
    ]
    for name in [*reversed(names), "checkpoint_10000_000002.pth.tar.new"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_checkpoints(tmp_path)] == names


def test_log_line_can_have_any_character():
    text = "2026-01-02 03:04:05 cannot decode a\x85b\nno stamp\n2026-13-02 03:04:05 no such month\n"
    assert [text for _, text in read_lines(text)] == ["cannot decode a\x85b"]


def test_options_are_of_the_last_start(tmp_path):
    start = {
        "kind": "start",
        "time": 1.8e9,
        "epoch": 0,
        "step": 0,
        "workers": 2,
        "nodes": 1,
        "images": 50,
        "steps_an_epoch": 6,
    }
    starts = [
        start | {"options": {"arch": arch, "lr": 0.5, "odd": {}}}
        for arch in ("resnet34", "resnet50")
    ]
    run = read_run(write_run(tmp_path, extra=jsonl(*starts)))
    assert run.options == {"arch": "resnet50", "lr": 0.5} and run.damaged == 0


def test_records_of_unknown_kinds_are_skipped(tmp_path):
    """A later version may write them."""
    run = read_run(write_run(tmp_path, extra='{"kind": "later", "text": "any", "loss": 9.0}\n'))
    assert run.damaged == 0 and len(run.steps["loss"]) == 3


def test_fields_have_the_declared_types(tmp_path):
    """Text is possible in a record of COURSE too, but its undeclared fields are numbers."""
    factor = {"kind": "factor", "epoch": 0, "step": 0, "loss_factor": 2.0}
    resumed = {"kind": "resumed", "time": 1.8e9, "epoch": 1, "step": 0, "later": ["a"]}
    sound = [
        factor | {"distiller": "one"},
        factor | {"distiller": "two", "later": 1.0},
        resumed | {"more": ["any"]},
    ]
    damaged = [
        factor | {"distiller": 1},
        factor | {"later": "text"},
        resumed | {"later": [1]},
        resumed | {"workers": "two"},
    ]
    run = read_run(write_run(tmp_path, extra=jsonl(*sound, *damaged)))
    assert [record["distiller"] for record in run.factors] == ["one", "two"]
    assert run.damaged == len(damaged)


def test_old_records_are_of_mgd(tmp_path):
    run = read_run(write_run(tmp_path, extra='{"epoch": 0, "step": 0, "loss_factor": 2.0}\n'))
    assert [record["distiller"] for record in run.refreshes + run.factors] == ["mgd"] * 2
    assert run.damaged == 0


def test_unfinished_record_counts_once_complete():
    line = '{"steps": 1, "epoch": 0, "step": 0, "loss": 1.0}'
    records = Records()
    records.add(line[:-1].encode())
    assert not records and records.damaged == 0
    records.add(line.encode())
    assert records.steps.arrays()["loss"].tolist() == [1.0] and records.damaged == 0


def test_missing_numbers_are_nan():
    columns = Columns()
    for record in ({"a": 1.0}, {"a": 2.0, "b": 3.0}, {"b": 4.0}):
        columns.add(record)
    arrays = columns.arrays()
    assert np.array_equal(arrays["a"], [1, 2, np.nan], equal_nan=True)
    assert np.array_equal(arrays["b"], [np.nan, 3, 4], equal_nan=True)


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": 1, "changed": 0.5}',
        '{"knn": 70.0}',
        '{"loss": 1.0, "steps": 1.5, "epoch": 0, "step": 0}',
        '{"kind": "warning", "text": "no time"}',
        '{"kind": "end", "time": 1.0, "how": 1, "text": "", "code": 0}',
        '{"kind": "start", "time": 1.0, "options": []}',
    ],
)
def test_record_without_required_fields_is_damaged(tmp_path, line):
    run = read_run(write_run(tmp_path, extra=line + "\n"))
    assert run.damaged == 1 and len(run.steps["loss"]) == 3
    assert len(run.refreshes) == len(run.knn) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "when: 2026-99-99",
        "big: " + "1" * 5000,
        "- 1",
        "a: {b: 1}",
        "a: !!python/none",
        "a: !!python/name:os.system",
        "a: !!int x",
        "a: &a 1\nb: *a",
    ],
)
def test_damaged_config_has_no_options(text):
    assert read_options(text) == {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arch": "resnet18"}, "resnet18"),  # of a run that is older than the option
        ({"arch": "resnet18", "width": 64}, "resnet18"),
        ({"arch": "resnet18", "width": 16}, "resnet18 of width 16"),
        ({"arch": "", "width": 16}, ""),
        ({}, ""),
    ],
)
def test_network_has_its_width_if_not_as_published(options, text):
    assert network(options) == text and PUBLISHED == WIDTH


def test_kind_is_linear_by_its_numbers(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"steps": 1, "epoch": 0, "step": 0, "loss": 5.0, "top1": 10.0}\n'
    )
    assert read_run(tmp_path).kind == "linear"


def test_smooth_ignores_nan():
    assert smooth(np.array([1.0, np.nan, 3.0, 5.0]), 2).tolist() == [1.0, 1.0, 3.0, 4.0]
