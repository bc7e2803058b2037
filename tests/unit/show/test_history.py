"""The history of a run's folder, whole, damaged or empty."""

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


def write_run(folder, steps=3, extra=""):
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
        {"kind": "end", "time": 1.8e9, "how": "error", "text": "no disk"},
    ]
    records[-1]["code"] = 2
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + extra
    )
    (folder / "config.yaml").write_text("arch: resnet18\nepochs: 2\n")
    return folder


def test_records_are_sorted_by_what_they_have(tmp_path):
    run = read_run(write_run(tmp_path))
    assert run.steps["loss"].tolist() == [5.0, 4.0, 3.0]
    assert [record["changed"] for record in run.refreshes] == [0.5] and [
        record["knn"] for record in run.knn
    ] == [70.0]
    assert (
        run.warnings == ["warning: slow", "error: no disk"]
        and run.kind == "train"
        and run.complete is None
        and run.damaged == 0
    )


def test_a_line_that_is_being_written_is_no_damage_and_others_are_counted(tmp_path):
    run = read_run(
        write_run(
            tmp_path,
            extra='not json\n{"loss": "high"}\n{"loss": 1' + "0" * 400 + '}\n[1]\n{"loss": 1.',
        )
    )
    assert run.damaged == 4 and len(run.steps["loss"]) == 3


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00\x85garbage\n"])
def test_a_folder_without_a_run_is_named_in_one_line(tmp_path, content):
    if content is not None:
        for name in ("metrics.jsonl", "config.yaml", "log.txt"):
            (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match="holds no run") as raised:
        read_run(tmp_path)
    assert raised.value.code == 2 and str(tmp_path) in str(raised.value)


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    names = [
        "checkpoint_9999_000000.pth.tar",
        "checkpoint_9999_000002.pth.tar",
        "checkpoint_10000_000000.pth.tar",
    ]
    for name in [*reversed(names), "checkpoint_10000_000002.pth.tar.new"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_checkpoints(tmp_path)] == names


def test_a_line_of_the_log_may_have_any_mark_in_it():
    text = "2026-01-02 03:04:05 cannot decode a\x85b\nno stamp\n2026-13-02 03:04:05 no such month\n"
    assert [text for _, text in read_lines(text)] == ["cannot decode a\x85b"]


def test_options_are_those_of_the_last_start(tmp_path):
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
    run = read_run(
        write_run(tmp_path, extra="".join(json.dumps(record) + "\n" for record in starts))
    )
    assert run.options == {"arch": "resnet50", "lr": 0.5} and run.damaged == 0


def test_records_of_kinds_that_are_not_known_are_passed_over(tmp_path):
    """Those of a later version."""
    run = read_run(write_run(tmp_path, extra='{"kind": "later", "text": "any", "loss": 9.0}\n'))
    assert run.damaged == 0 and len(run.steps["loss"]) == 3


def test_a_field_is_of_the_type_that_the_schema_declares(tmp_path):
    """Text as well, in a record of the course; other fields there are numbers."""
    factor = {"kind": "factor", "epoch": 0, "step": 0, "loss_factor": 2.0}
    saved = {"kind": "resumed", "time": 1.8e9, "epoch": 1, "step": 0, "later": ["a"]}
    sound = [
        factor | {"distiller": "one"},
        factor | {"distiller": "two", "later": 1.0},
        saved | {"more": ["any"]},
    ]
    damaged = [
        factor | {"distiller": 1},
        factor | {"later": "text"},
        saved | {"later": [1]},
        saved | {"workers": "two"},
    ]
    run = read_run(
        write_run(tmp_path, extra="".join(json.dumps(record) + "\n" for record in sound + damaged))
    )
    assert [record["distiller"] for record in run.factors] == ["one", "two"] and run.damaged == len(
        damaged
    )


def test_records_of_an_earlier_version_are_mgd_s(tmp_path):
    run = read_run(write_run(tmp_path, extra='{"epoch": 0, "step": 0, "loss_factor": 2.0}\n'))
    assert [record["distiller"] for record in run.refreshes + run.factors] == [
        "mgd",
        "mgd",
    ] and run.damaged == 0


def test_a_last_record_without_an_end_counts_once_it_is_whole():
    line = '{"steps": 1, "epoch": 0, "step": 0, "loss": 1.0}'
    records = Records()
    records.add(line[:-1].encode())
    assert not records and records.damaged == 0
    records.add(line.encode())
    assert records.steps.arrays()["loss"].tolist() == [1.0] and records.damaged == 0


def test_a_number_that_only_some_steps_have_is_nan_in_the_others():
    columns = Columns()
    for record in ({"a": 1.0}, {"a": 2.0, "b": 3.0}, {"b": 4.0}):
        columns.add(record)
    found = columns.arrays()
    assert np.array_equal(found["a"], [1, 2, np.nan], equal_nan=True)
    assert np.array_equal(found["b"], [np.nan, 3, 4], equal_nan=True)


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
def test_a_record_without_its_place_is_damaged(tmp_path, line):
    run = read_run(write_run(tmp_path, extra=line + "\n"))
    assert (
        run.damaged == 1 and len(run.steps["loss"]) == 3 and len(run.refreshes) == len(run.knn) == 1
    )


@pytest.mark.parametrize(
    "text", ["a: [", "when: 2026-99-99", "big: " + "1" * 5000, "- 1", "a: !!python/none"]
)
def test_a_damaged_config_tells_no_options(text):
    assert read_options(text) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "resnet18"}, "resnet18"),  # of a run from before there was the option
        ({"arch": "resnet18", "width": 64}, "resnet18"),
        ({"arch": "resnet18", "width": 16}, "resnet18 of width 16"),
        ({"arch": "", "width": 16}, ""),
        ({}, ""),
    ],
)
def test_a_network_s_width_is_told_where_it_is_not_as_published(options, words):
    assert network(options) == words and PUBLISHED == WIDTH


def test_a_linear_run_is_told_by_its_numbers_where_its_options_are_lost(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"steps": 1, "epoch": 0, "step": 0, "loss": 5.0, "top1": 10.0}\n'
    )
    assert read_run(tmp_path).kind == "linear"


def test_smoothed_values_are_means_of_what_is_there():
    assert smooth(np.array([1.0, np.nan, 3.0, 5.0]), 2).tolist() == [1.0, 1.0, 3.0, 4.0]
