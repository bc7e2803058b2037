"""The log: lines, records, resumes, progress, and failures of disk and screen."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
import time

import pytest

from job.errors import RunError
from job.metrics import schema
from job.metrics.log import Log, drop_from

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture
def opened():
    """A function that opens logs. They are closed at the end."""
    logs = []

    def open_log(folder, start=(0, 0), speaks=True):
        log = Log(speaks)
        logs.append(log)
        log.open(str(folder), start)
        return log

    yield open_log
    for log in logs:
        log.close()


def lines(folder):
    """Return the lines of a folder's log, without their times."""
    text = (folder / "log.txt").read_text()
    assert all(re.match(STAMP, line) for line in text.splitlines())
    return re.sub(f"^{STAMP}", "", text, flags=re.MULTILINE).splitlines()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_line_is_printed_and_written(tmp_path, opened, capsys):
    opened(tmp_path).line("hello é")
    assert capsys.readouterr().out == "hello é\n"
    assert lines(tmp_path) == ["hello é"]


def test_note_is_only_written(tmp_path, opened, capsys):
    opened(tmp_path).note("quiet")
    assert capsys.readouterr().out == ""
    assert lines(tmp_path) == ["quiet"]


def test_lines_before_open_are_written_first(tmp_path, capsys):
    log = Log(True)
    log.line("one")
    log.note("two")
    assert capsys.readouterr().out == "one\n"
    assert os.listdir(tmp_path) == []
    log.open(str(tmp_path), (0, 0))
    log.line("three")
    log.close()
    assert lines(tmp_path) == ["one", "two", "three"]


def test_lines_are_written_at_once(tmp_path, opened):
    """A kill loses no line."""
    log = opened(tmp_path)
    log.line("now")
    log.record("step", steps=1)
    assert lines(tmp_path) == ["now"]
    assert metrics(tmp_path) == [{"kind": "step", "steps": 1}]


def test_record_is_line_of_json(tmp_path, opened):
    log = opened(tmp_path)
    log.record("step", steps=1, loss=0.5)
    log.record("refresh", epoch=2, stage=4)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"kind": "step", "steps": 1, "loss": 0.5}\n{"kind": "refresh", "epoch": 2, "stage": 4}\n'
    )


def test_records_before_open_are_written_first(tmp_path):
    log = Log(True)
    log.remark("warning", "rate_jump", "the rate jumps")
    log.open(str(tmp_path), (0, 0))
    log.record("saved", "saved x", path="x")
    log.close()
    assert [(record["kind"], record.get("text")) for record in metrics(tmp_path)] == [
        ("warning", "the rate jumps"),
        ("saved", None),
    ]
    assert lines(tmp_path) == ["warning: the rate jumps", "saved x"]


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("hint", {"kind": "hint", "id": "name", "text": "some"}),
        ("warning", {"kind": "warning", "id": "name", "text": "some"}),
        ("error", {"kind": "end", "how": "error", "id": "name", "text": "some", "code": 1}),
    ],
)
def test_remark_is_line_and_timed_record(tmp_path, opened, kind, record):
    before = time.time()
    opened(tmp_path).remark(kind, "name", "some")
    [actual] = metrics(tmp_path)
    assert before - 1 < actual.pop("time") < time.time() + 1
    assert actual == record and lines(tmp_path) == [f"{kind}: some"]


def test_silent_log_writes_no_output(tmp_path, opened, capsys):
    log = opened(tmp_path, speaks=False)
    log.line("a")
    log.note("b")
    log.record("step", steps=1)
    log.progress("c", 1, 1, 1)
    log.close()
    assert capsys.readouterr() == ("", "")
    assert os.listdir(tmp_path) == []


def test_resume_appends_to_files(tmp_path, opened):
    log = opened(tmp_path)
    log.line("first")
    log.record("step", epoch=0, step=0, steps=1)
    log.close()
    log = opened(tmp_path, start=(0, 1))
    log.line("second")
    log.record("step", epoch=0, step=1, steps=2)
    assert lines(tmp_path) == ["first", "second"]
    assert [(record["epoch"], record["step"]) for record in metrics(tmp_path)] == [(0, 0), (0, 1)]


def test_line_accepts_name_that_is_not_utf_8(tmp_path, opened):
    """File names are bytes. Warnings of undecodable images contain any of them."""
    log = opened(tmp_path)
    log.line("cannot decode caf\udce9.png")
    log.note("error: caf\udce9.png")
    log.close()
    assert [line.partition("caf")[0] for line in lines(tmp_path)] == ["cannot decode ", "error: "]


STEPS, STAGES = 4, (3, 4)  # steps of an epoch, stages of a refresh


def run_through(log, first, last):
    """Record steps from `first` on, like a run, with a refresh at the start of each epoch."""
    for done in range(first, last):
        if done % STEPS == 0:
            for stage in STAGES:
                log.record("refresh", epoch=done // STEPS, step=0, stage=stage, changed=0.5)
        log.record(
            "step", steps=done + 1, epoch=done // STEPS, step=done % STEPS, loss=1 / (done + 1)
        )


@pytest.fixture
def uninterrupted(tmp_path, opened):
    """The metrics of an uninterrupted run of ten steps."""
    (tmp_path / "uninterrupted").mkdir()
    run_through(opened(tmp_path / "uninterrupted"), 0, 10)
    return (tmp_path / "uninterrupted" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("stopped", "resumed"),
    [(stopped, resumed) for stopped in range(1, 10) for resumed in range(1, stopped + 1)],
)
def test_resume_records_each_step_once(tmp_path, opened, stopped, resumed):
    run_through(opened(tmp_path), 0, stopped)
    run_through(opened(tmp_path, start=divmod(resumed, STEPS)), resumed, 10)
    assert [record["steps"] for record in metrics(tmp_path) if "loss" in record] == list(
        range(1, 11)
    )


@pytest.mark.parametrize("resumed", range(1, 9))
def test_resumed_metrics_equal_uninterrupted(tmp_path, opened, uninterrupted, resumed):
    """Refreshes too: earlier records stay, and a repeated one is recorded once."""
    run_through(opened(tmp_path), 0, 9)
    run_through(opened(tmp_path, start=divmod(resumed, STEPS)), resumed, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted


@pytest.mark.parametrize("kind", sorted(schema.PROCESS))
@pytest.mark.parametrize("start", [(0, 0), (0, 2), (2, 0)])
def test_resume_keeps_process_records(tmp_path, opened, kind, start):
    log = opened(tmp_path)
    log.record(kind, epoch=1, step=0)
    log.record("collapse", epoch=1, step=0, feature_std=0.5)
    log.close()
    opened(tmp_path, start)
    assert [record["kind"] for record in metrics(tmp_path)] == [kind, "collapse"][
        : 1 + (start > (1, 0))
    ]


@pytest.mark.parametrize("start", [(0, 0), (1, 2), (2, 0)])
def test_resume_keeps_earlier_unknown_records(tmp_path, opened, start):
    """A later version or another tool wrote them. Records of repeated positions are dropped."""
    note, evicted, map = (
        {"kind": "note", "by": "a tool"},
        {"kind": "evicted", "epoch": 1},
        {"epoch": 1, "step": 2, "map": 0.5},
    )
    records = [
        note,
        {"text": "no kind"},
        evicted,
        map,
        {"kind": "later"} | map,
        {"kind": "odd", "epoch": [], "step": 0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    opened(tmp_path, start)
    assert metrics(tmp_path) == [
        record for record in records if start > (1, 2) or record.get("map") is None
    ]


def test_resume_drops_course_without_position(tmp_path, opened):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "loss": 1.0}\n{"knn": 5.0, "epoch": 0}\n'
    )
    opened(tmp_path, (9, 0))
    assert metrics(tmp_path) == []


def test_resume_drops_records_without_kind(tmp_path, opened, uninterrupted):
    """Records of an earlier version have no kind. They are dropped like others."""
    for line in uninterrupted.splitlines():
        record = json.loads(line)
        del record["kind"]
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    assert Log(True).open(str(tmp_path), (1, 2)) == 6
    kept = [
        json.loads(line)
        for line in uninterrupted.splitlines()
        if (json.loads(line)["epoch"], json.loads(line)["step"]) < (1, 2)
    ]
    assert metrics(tmp_path) == [
        {name: value for name, value in record.items() if name != "kind"} for record in kept
    ]


def test_restart_drops_all_steps(tmp_path, opened, uninterrupted):
    """Before its first checkpoint, `--resume auto` starts a run from the first step."""
    run_through(opened(tmp_path), 0, 3)
    run_through(opened(tmp_path), 0, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted


@pytest.mark.parametrize("cut", [1, 2, 5, 20, 40])
def test_resume_drops_incomplete_last_line(tmp_path, opened, cut):
    """It is incomplete even if only the line end is missing: the next record starts a new line."""
    run_through(opened(tmp_path), 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run_through(opened(tmp_path, start=(0, 3)), 3, 4)
    actual = [record["steps"] for record in metrics(tmp_path) if "loss" in record]
    assert actual in ([1, 2, 4], [1, 2, 3, 4])


def test_resume_without_metrics_starts_file(tmp_path, opened):
    opened(tmp_path, start=(1, 3)).record("step", epoch=1, step=3)
    assert metrics(tmp_path) == [{"kind": "step", "epoch": 1, "step": 3}]


def test_resume_keeps_longer_epochs(tmp_path, opened):
    """The batch size can change after an epoch. The count of steps continues."""
    log = opened(tmp_path)
    for step in range(8):
        log.record("step", steps=step + 1, epoch=0, step=step)
    log.close()
    opened(tmp_path, start=(1, 0)).record("step", steps=3, epoch=1, step=0)
    assert [(record["epoch"], record["step"]) for record in metrics(tmp_path)] == [
        (0, step) for step in range(8)
    ] + [(1, 0)]


def test_drop_from_is_atomic(tmp_path, opened, monkeypatch):
    run_through(opened(tmp_path), 0, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, start=(0, 1))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("total", "every", "expected"),
    [(10, 3, [3, 6, 9, 10]), (10, 5, [5, 10]), (2, 100, [2]), (3, 1, [1, 2, 3]), (1, 1, [1])],
)
def test_progress_prints_lines_without_terminal(tmp_path, opened, capsys, total, every, expected):
    log = opened(tmp_path)
    for done in range(1, total + 1):
        log.progress(f"step {done}", done, total, every)
    assert capsys.readouterr().out.splitlines() == [f"step {done}" for done in expected]
    assert lines(tmp_path) == [f"step {done}" for done in expected]


def test_progress_is_bar_on_terminal(tmp_path, opened, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log = opened(tmp_path)
    for total in (4, 4, 3):
        for done in range(1, total + 1):
            log.progress(f"step {done}/{total}", done, total, 1)
            assert (log.bar is None) == (done == total)
    log.progress("step 2/5", 2, 5, 1)
    log.line("between")
    log.close()
    assert lines(tmp_path) == ["between"]
    assert "%|" in capsys.readouterr().out


def test_close_twice_or_unopened(tmp_path, opened):
    Log(True).close()
    log = opened(tmp_path)
    log.close()
    log.close()


def test_check_raises_on_full_disk(tmp_path, opened):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = opened(tmp_path)
    log.check()
    log.line("hello")
    log.record("step", epoch=0, step=0)
    with pytest.raises(RunError) as caught:
        log.check()
    assert f"cannot write to {tmp_path}/log.txt: No space left on device" in str(caught.value)
    assert caught.value.code == 2


def test_resume_drops_only_damaged_lines(tmp_path, opened):
    good = '{"epoch": 0, "step": 0}\n'
    damaged = [b'{"epoch": 0, "step\xff": 1}', b"3", b"\0\0\0", b"[" * 10**5, b'{"epoch": 0, "st']
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + b"\n".join(damaged))
    opened(tmp_path, start=(1, 0))
    assert (tmp_path / "metrics.jsonl").read_text() == good


def test_drop_from_on_full_disk_keeps_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0, "step": 0}\n' * 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            drop_from(str(path), (1, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert path.stat().st_size == 2400


GONE = """
import sys
from job import output
from job.metrics.log import Log
with output.guarded():
    log = Log(True)
    log.open(sys.argv[1], (0, 0))
    log.progress("loading", 1, 3, 1)
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    log.progress("loading", 2, 3, 1)
    log.line("saved")
    log.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("screen", ["terminal", "pipe"])
def test_lost_screen_is_one_warning(tmp_path, screen):
    """Like the terminal of a broken session, or the pipe to a killed launcher."""
    mine, its = pty.openpty() if screen == "terminal" else os.pipe()
    command = [sys.executable, "-c", GONE, tmp_path]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=its, stderr=subprocess.PIPE, text=True
    )
    os.close(its)
    assert process.stderr.readline() == "ready\n"
    os.close(mine)
    _, errors = process.communicate("\n", timeout=60)
    problem = {"terminal": "Input/output error", "pipe": "Broken pipe"}[screen]
    [warning] = metrics(tmp_path)
    assert (warning["kind"], warning["id"]) == ("warning", "standard_output")
    assert problem in warning["text"] and f"{tmp_path}/log.txt" in warning["text"]
    assert (process.returncode, errors) == (0, f"warning: {warning['text']}\n")
    assert (
        lines(tmp_path).count(f"warning: {warning['text']}") == 1 and lines(tmp_path)[-1] == "saved"
    )
