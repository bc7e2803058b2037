"""mgd-watch: running, ended, old and damaged runs, job logs, and a real terminal."""

import contextlib
import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.show.read.tail import Curve
from job.show.watch.app import Watch, main
from job.show.watch.panel import ASCII, UNICODE, sparkline
from job.show.watch.state import Progress

NOW = "2026-01-02 03:04:05"
STARTED = time.time()
OPTIONS = {"arch": "resnet18", "epochs": 4, "batch_size": 10, "image_size": 32, "teacher": ""}


def record(step, loss=4.0):
    """Return the record of a step. An epoch has 10 steps."""
    return {
        "steps": step + 1,
        "epoch": step // 10,
        "step": step % 10,
        "loss": loss,
        "contrastive": loss - 1,
        "distillation": 1.0,
        "accuracy": 10.0,
        "lr": 0.1,
        "images_per_s": 20.0,
        "data_wait": 0.1,
    }


def start(epoch=0, step=0, **more):
    """Return the record of a process with two workers that starts at a position."""
    return {
        "kind": "start",
        "time": STARTED,
        "epoch": epoch,
        "step": step,
        "options": OPTIONS,
        "workers": 2,
        "nodes": 1,
        "images": 100,
        "steps_an_epoch": 10,
    } | more


def remark(text, kind="warning", **more):
    """Return the record of a hint or warning."""
    return {"kind": kind, "time": time.time(), "text": text} | more


def jsonl(*records):
    """Return records as lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def add(folder, *records):
    """Append records to a run."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(jsonl(*records))


def start_try(number, run):
    """Return the lines that slurm/functions.sh writes at the start of a try."""
    record = {"kind": "try", "time": 1.8e9, "number": number, "nodes": "node[1-2]", "run": str(run)}
    return f"{NOW} node1: try {number}\n{jsonl(record)}"


def write_run(folder, steps=15, **options):
    """Write a run with `steps` steps done, as job.train does. Return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    options = OPTIONS | options
    (folder / "config.yaml").write_text(json.dumps(options))
    (folder / "metrics.jsonl").write_text("")
    add(folder, start(options=options), *({"kind": "step", **record(n)} for n in range(steps)))
    return folder


def write_old_run(folder, steps=15, **options):
    """Write a run of an earlier version: records without kinds, options in config.yaml only."""
    write_run(folder, **options)
    (folder / "metrics.jsonl").write_text(jsonl(*map(record, range(steps))))
    return folder


def progress(folder):
    """Return the progress of a run, read once."""
    run = Progress(folder)
    run.update()
    return run


def watch(*arguments, encoding="utf-8"):
    """Run mgd-watch in this process, 80 columns wide. Return its exit code and both outputs."""
    code, output = 0, io.TextIOWrapper(io.BytesIO(), encoding)
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(io.StringIO()) as errors,
        mock.patch.dict(os.environ, COLUMNS="80"),
    ):
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        output.flush()
    stdout = output.buffer.getvalue().decode(encoding)
    return SimpleNamespace(returncode=code, stdout=stdout, stderr=errors.getvalue())


def flat_output(*arguments):
    """Return the output of mgd-watch with single spaces."""
    return " ".join(watch(*arguments).stdout.split())


@given(
    st.lists(st.one_of(st.floats(allow_infinity=False), st.floats(-1e9, 1e9)), max_size=80),
    st.sampled_from([UNICODE[0], ASCII[0]]),
)
def test_sparkline_orders_marks_as_values(values, marks):
    line = sparkline(values, marks)
    assert len(line) == len(values)
    shown = sorted(
        (value, marks.index(mark))
        for value, mark in zip(values, line, strict=True)
        if not math.isnan(value)
    )
    assert [mark for _, mark in shown] == sorted(mark for _, mark in shown)
    assert all(mark == " " for value, mark in zip(values, line, strict=True) if math.isnan(value))


@given(st.integers(1, 3000), st.integers(2, 64))
def test_curve_stays_small_and_keeps_the_mean(steps, most):
    curve = Curve(most)
    for step in range(steps):
        curve.add(step, float(step))
    assert len(curve.sums) <= most and len(curve.columns(20)) <= 20
    assert sum(total for total, _ in curve.sums.values()) == steps * (steps - 1) / 2


def test_running_run_shows_position_and_time_left(tmp_path):
    run = progress(write_run(tmp_path / "run"))
    assert run.state() == "running" and run.position == (1, 5, 10) and run.fraction == 15 / 40
    assert 0 < run.left() <= 12.5  # 25 steps of half a second
    shown = watch(tmp_path / "run").stdout
    assert "38 %, epoch 1 step 5/10, of 4 epochs" in shown
    assert "batch 10, 2 workers" in shown and "ratio 0.33" in shown


def test_resume_with_other_batch_size_starts_its_epoch(tmp_path):
    """The queue was filled with the first batch size."""
    folder = write_run(tmp_path / "run", 20)
    before = {"batch_size_before": 10, "steps_an_epoch_before": 10}
    change = {"epoch": 2, "step": 0, "batch_size": 5, "steps_an_epoch": 20, **before}
    options = {"epochs": 4, "batch_size": 5, "moco_k": 40}
    add(folder, start(2, options=options, steps_an_epoch=20), {"kind": "change", **change})
    run = progress(folder)
    assert run.position == (2, 0, 20) and run.fraction == 0.5 and run.filled == 4
    add(folder, record(20) | {"step": 0})
    run.update()
    assert run.position == (2, 1, 20) and run.fraction == (2 + 1 / 20) / 4


def test_update_reads_new_lines_and_replaced_files(tmp_path):
    run = progress(write_run(tmp_path / "run"))
    before = run.metrics.offset
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write(jsonl(record(15)) + '{"steps": 17')
    run.update()
    assert run.records.count == 16 and run.metrics.offset == before + len(jsonl(record(15)))
    (tmp_path / "new").write_text(jsonl(record(0)))
    os.replace(tmp_path / "new", tmp_path / "run/metrics.jsonl")  # as a resumed run does
    run.update()
    assert run.records.count == 1 and run.position[:2] == (0, 1)


def test_checkpoint_is_the_newest_if_last_is_a_copy(tmp_path):
    run = Progress(write_run(tmp_path / "run"))
    for name, size in {"checkpoint_0001_000000": 1, "checkpoint_0002_000000": 2, "last": 3}.items():
        (tmp_path / "run" / f"{name}.pth.tar").write_bytes(bytes(size))
    name, _, size = run.checkpoint()
    assert (name, size) == ("checkpoint_0002_000000.pth.tar", 2)


@pytest.mark.parametrize(
    ("how", "state"), [("stopped", "stopped"), ("error", "error"), ("complete", "done")]
)
def test_end_is_the_state_until_a_process_starts(tmp_path, how, state):
    folder = write_run(tmp_path / "run")
    run = Progress(folder)
    add(folder, {"kind": "end", "time": time.time(), "how": how, "text": "no disk", "code": 0})
    run.update()
    assert run.state() == state and ("error: no disk" in run.records.warnings) == (how == "error")
    add(folder, start(1, 5), {"kind": "resumed", "time": time.time(), "epoch": 1, "step": 5})
    run.update()
    assert run.state() == "running" and run.records.resumed == 1 and not run.records.warnings
    shown = flat_output(folder)
    assert "run: running" in shown and "resumed once" in shown and "error" not in shown


def test_warnings_are_shown_once_with_their_age(tmp_path):
    folder = write_run(tmp_path / "run")
    add(
        folder,
        *(
            remark(f"slow disk, {number} s", kind) | {"time": time.time() - 1200}
            for number in (1, 2)
            for kind in ("hint", "warning")
        ),
    )
    shown = flat_output(folder)
    assert shown.count("slow disk") == 2
    assert "hint: slow disk, 2 s (20 min ago)" in shown and "warning: slow disk, 2 s" in shown


def test_remarks_of_one_id_show_the_last(tmp_path):
    folder = write_run(tmp_path / "run")
    add(
        folder,
        *(remark(text, id="wait") for text in ("slow images", "half of the time")),
        remark("slow images", "hint", id="wait"),
    )
    assert [text for _, text in progress(folder).records.warnings.values()] == [
        "warning: half of the time",
        "hint: slow images",
    ]


def test_time_left_counts_work_between_epochs(tmp_path):
    """Saves at an epoch's end, k-NN and refreshes. A save within an epoch is in a step's time."""
    folder = write_run(tmp_path / "run", teacher="x", refresh_epochs="every:1")
    run = progress(folder)
    before = run.left()
    saves = (
        {"kind": "saved", "time": 1.0, "epoch": 1, "step": step, "path": "x", "seconds": 3.0}
        for step in (0, 4)
    )
    seconds = {"measuring": 50.0, "gathering": 10.0, "solving": 5.0}
    refreshes = (
        {"kind": "refresh", "epoch": 1, "step": 0, "stage": stage, "changed": 0.5, **seconds}
        for stage in (3, 4)
    )
    add(folder, *saves, {"kind": "knn", "epoch": 1, "knn": 50.0, "knn_seconds": 4.0}, *refreshes)
    run.update()
    # The ends of epochs 1 to 3, and the refreshes before epochs 2 and 3.
    assert run.left() - before == pytest.approx(3 * 7 + 2 * 65, abs=2)


def test_refresh_is_shown_for_each_distiller(tmp_path):
    folder = write_run(tmp_path / "run")
    refresh = {"kind": "refresh", "epoch": 1, "step": 0, "measuring": 5.0, "cost_after": 0.5}
    add(
        folder,
        *(
            refresh | {"distiller": f"d{n}", "stage": stage, "changed": n / 10}
            for n in (1, 2)
            for stage in (3, 4)
        ),
    )
    shown = flat_output(folder)
    header = "matching refresh 1, before epoch 1, 10.0 s"
    one, two = (
        f"d{n} layer3 layer4 changed {10 * n} % {10 * n} % cost 0.500 0.500" for n in (1, 2)
    )
    assert f"{header} {one} {two}" in shown
    del refresh["cost_after"]
    add(folder, refresh | {"epoch": 2, "distiller": "d2", "stage": 4, "changed": 0.3})
    shown = flat_output(folder)
    one = "d1 layer3 layer4 before epoch 1 changed 10 % 10 % cost 0.500 0.500"
    assert f"matching refresh 2, before epoch 2, 5.0 s {one} d2 layer4 changed 30 %" in shown
    assert shown.count("cost") == 1


def test_old_run_is_shown_by_its_numbers(tmp_path):
    run = progress(folder := write_old_run(tmp_path / "run"))
    assert run.state() == "running" and run.position == (1, 5, 10) and run.fraction == 15 / 40
    shown = watch(folder).stdout
    assert "epoch 1 step 5/10, of 4 epochs" in shown
    assert "resnet18" in shown and "damaged" not in shown


def test_steps_of_an_epoch_are_shown_once_known(tmp_path):
    """In its first epoch, a run of an earlier version has no record of them."""
    folder = write_old_run(tmp_path / "run", steps=3, epochs=1)
    assert re.search(r"  epoch 0 step 3, of 1 epochs\n", watch(folder).stdout)
    (folder / "complete").write_text("done\n")
    assert "100 %, epoch 0 step 3/3, of 1 epochs\n" in watch(folder).stdout


def test_run_without_steps_shows_its_last_log_line(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    assert "empty so far" in watch(folder).stdout
    (folder / "log.txt").write_text(f"{NOW} one\n{NOW} measuring the loss factor\n")
    assert re.search("log +measuring the loss factor\n", watch(folder).stdout)


def test_run_without_new_records_is_stale(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "config.yaml"):
        os.utime(run / name, (time.time() - 720,) * 2)
    assert "run: no new record for 12 min: stopped, or waiting" in watch(run).stdout
    (run / "metrics.jsonl").unlink()
    os.utime(run / "config.yaml")
    assert "run: starting: waits for its first step" in watch(run).stdout


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff garbage\n"])
def test_damaged_folder_is_one_line_and_exit_code_2(tmp_path, content):
    if content is not None:
        for name in ("metrics.jsonl", "config.yaml", "log.txt"):
            (tmp_path / name).write_bytes(content)
    ended = watch(tmp_path)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: {tmp_path} holds no run")


def test_job_log_shows_its_run_and_tries(tmp_path):
    run = write_run(tmp_path / "runs" / "mgd-train-1")
    log = tmp_path / "mgd-train-1.log"
    one, two = (start_try(number, run) for number in (1, 2))
    log.write_text(f"{one}{NOW} node1: any sentence\n{two}{NOW} node1: another\n")
    for path in (log, tmp_path):
        shown = flat_output(path)
        assert "try 2 on node[1-2] last line: node1: another" in shown
        assert "epoch 1 step 5/10" in shown


@pytest.mark.parametrize(
    ("status", "shown"),
    [({}, "decision: limit"), ({"status": 1}, "decision: limit, exit status 1")],
)
def test_decision_is_shown_until_the_next_try(tmp_path, status, shown):
    run, log = write_run(tmp_path / "run"), tmp_path / "mgd-train-1.log"
    decision = {"kind": "decision", "time": 1.8e9, "reason": "limit"} | status
    log.write_text(f"{start_try(1, run)}{jsonl(decision)}{NOW} node1: any sentence\n")
    assert f"job try 1 on node[1-2] {shown} last line: node1: any sentence" in flat_output(log)
    with open(log, "a") as file:
        file.write(start_try(2, run))
    assert "decision: " not in watch(log).stdout


@pytest.mark.parametrize("rank", ["", "rank 0 on node1: "])
def test_error_in_job_log_and_records_is_shown_once(tmp_path, rank):
    run, log = write_run(tmp_path / "run"), tmp_path / "mgd-train-1.log"
    add(run, {"kind": "end", "time": time.time(), "how": "error", "text": "no disk", "code": 1})
    log.write_text(f"{start_try(1, run)}error: {rank}no disk\n")
    assert watch(log).stdout.count("no disk") == 1
    with open(log, "a") as file:
        file.write("error: batch: not requeued: no scontrol\n")
    shown = watch(log).stdout
    assert shown.count("no disk") == 1 and "error: batch: not requeued: no scontrol" in shown


def test_old_job_log_shows_its_run(tmp_path):
    """It has sentences instead of records."""
    run, log = write_run(tmp_path / "run"), tmp_path / "mgd-train-1.log"
    log.write_text(
        f"{NOW} node1: try 1 on node1, runtime none: python\n{NOW} node1: run's folder: {run}\n"
    )
    assert "epoch 1 step 5/10" in watch(log).stdout


def test_runs_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10", "2"):
        write_run(tmp_path / "array" / name)
    shown = watch(tmp_path / "array").stdout
    assert shown.index("array/2: running") < shown.index("array/10: running")
    assert len(shown.splitlines()) < 14


@pytest.mark.parametrize(
    "line",
    [
        "",
        f"{NOW} node1: data: copying data.tar (147G) to /tmp, 800G free\n",
        "error: node1: no disk\n",
    ],
)
def test_job_without_run_waits(tmp_path, line):
    log, run = tmp_path / "mgd-train-1.log", tmp_path / "run"
    log.write_text(line)
    ended = watch(log)
    assert ended.returncode == 0 and "mgd-train-1.log: waits for its first try" in ended.stdout
    assert line.removeprefix(f"{NOW} ").strip() in ended.stdout
    run.mkdir()
    with open(log, "a") as file:
        file.write(start_try(1, run))
    shown = watch(log).stdout
    assert f"{run.name}: waits for its first step" in shown
    assert "try 1 on node[1-2]" in shown and "error" not in shown
    write_run(run)
    assert f"{run.name}: running" in watch(log).stdout


def test_other_file_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "notes.log").write_bytes(b"\x00\xff to do\n")
    ended = watch(tmp_path / "notes.log")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "names no run folder" in ended.stderr


def damage(run, how):
    """Replace a run's files by garbage, or make its records unreadable."""
    if how == "garbage":
        for name in ("metrics.jsonl", "config.yaml", "log.txt"):
            (run / name).write_bytes(b"\x00\xff garbage\n")
    else:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()  # unreadable even for root


@pytest.mark.parametrize(
    ("how", "problem"),
    [("garbage", "2 holds no run: "), ("unreadable", "2/metrics.jsonl: Is a directory")],
)
def test_damaged_run_among_several_is_one_line(tmp_path, monkeypatch, how, problem):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "array" / name) for name in ("1", "2", "3")]
    damage(runs[1], how)
    ended = watch("array", "--once")
    blocks = ended.stdout.split("\n\n")
    assert ended.returncode == 0 and len(blocks) == 3
    assert blocks[1].startswith(f"array/{problem}") and "\n" not in blocks[1]
    assert "array/1: running" in blocks[0] and "array/3: running" in blocks[2]
    ended = watch("array/2")
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1


def test_run_that_becomes_unreadable_stays_with_reason(tmp_path):
    runs = Watch([write_run(tmp_path / "run")])
    runs.start()
    damage(tmp_path / "run", "unreadable")
    runs.update()
    shown = "\n".join(runs.lines(200, UNICODE, False))
    assert "epoch 1 step 5/10" in shown and "run/metrics.jsonl: Is a directory" in shown
    (tmp_path / "run/metrics.jsonl").rmdir()
    write_run(tmp_path / "run", 16)
    runs.update()
    shown = "\n".join(runs.lines(200, UNICODE, False))
    assert "epoch 1 step 6/10" in shown and "Is a directory" not in shown


def test_runs_are_found_later_and_kept_when_moved(tmp_path):
    runs = Watch([tmp_path / "array"])
    write_run(tmp_path / "array" / "1")
    runs.start()
    write_run(tmp_path / "array" / "0")
    runs.update()
    first, _ = [line for line in runs.lines(80, UNICODE, False) if line.endswith(": running")]
    assert first.endswith("array/0: running")
    (tmp_path / "array").rename(tmp_path / "away")
    runs.update()
    lines = runs.lines(200, UNICODE, False)
    assert sum("holds no run" in line or "no such file" in line for line in lines) == 3


def test_loss_is_shown_from_when_keys_fill_the_queue(tmp_path):
    run = write_run(tmp_path / "run", 0, moco_k=40)
    add(run, *(record(step, 0.5 if step < 3 else 9.0 - step / 10) for step in range(20)))
    assert re.search(r" highest 8.7, lowest 7.1$", watch(run).stdout, re.MULTILINE)


def test_closed_pipe_ends_watch_silently(tmp_path):
    write_run(tmp_path / "run")
    # A longer path would be cut to the terminal's width.
    line = f"{sys.executable} -m job.show.watch run --every 0.1 | head -1"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environment,
    )
    assert ended.stdout == "run: running\n" and ended.stderr == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [({}, "resnet18, no teacher"), ({"width": 16}, "resnet18 of width 16, no teacher")],
)
def test_run_line_has_a_width_if_not_as_published(tmp_path, options, text):
    run = write_run(tmp_path / "run", **options)
    assert re.search(rf"^ *run +{text}$", watch(run).stdout, re.MULTILINE)


def test_runs_show_options_that_differ(tmp_path):
    for name, factor in (("1", 100), ("2", 1000)):
        write_run(tmp_path / "array" / name, loss_factor=factor)
    lines = watch(tmp_path / "array").stdout.splitlines()
    assert "  loss_factor 100" in lines and "  loss_factor 1000" in lines
    assert "resnet18" not in "".join(lines)


def test_end_in_another_year_has_its_year(tmp_path):
    run = write_run(tmp_path / "run", epochs=20000000)  # 2e8 steps of half a second
    year = time.localtime(time.time() + 1e8).tm_year
    assert re.search(rf"1157 d .* left, until \d\d \w+ {year}$", watch(run).stdout, re.MULTILINE)


def test_bar_stays_short_for_an_impossible_epoch(tmp_path):
    run = write_run(tmp_path / "run")
    add(run, record(20) | {"epoch": -(10**9)})
    assert max(map(len, watch(run).stdout.splitlines())) < 200


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 4]))
NAMES = "steps epoch step stage loss contrastive distillation accuracy top1 lr images_per_s"
NAMES += " data_wait changed cost_after knn val_top1"
NAMES = [*NAMES.split(), "feature_std", "queue_rank", "dead_layer1", "refreshes"]
OPTION_NAMES = "epochs batch_size arch teacher pretrained image_size refresh_epochs loss_factor"


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), NUMBERS), max_size=6),
    st.lists(st.text(max_size=200), max_size=4),
    st.dictionaries(
        st.sampled_from(OPTION_NAMES.split()),
        st.one_of(NUMBERS, st.text(), st.lists(st.integers())),
    ),
    st.integers(20, 120),
    st.sampled_from([UNICODE, ASCII]),
)
@settings(max_examples=100, deadline=None)
def test_lines_fit_the_terminal_for_any_records(
    tmp_path_factory, records, texts, options, width, marks
):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("1", "2"):
        run = write_run(folder / name)
        add(run, *(record(20 + number) | other for number, other in enumerate(records)), *records)
        add(run, *map(remark, texts), start(options=options | {"name": name * 200}))
    for path in (folder, folder / "1"):
        runs = Watch([path])
        runs.start()
        lines = runs.lines(width, marks, False)
        columns = [
            sum(2 if unicodedata.east_asian_width(character) in "FW" else 1 for character in line)
            for line in lines
        ]
        assert max(columns) <= width and all(line.isprintable() for line in lines)


def test_encoding_without_blocks_gets_ascii(tmp_path):
    assert "#" in watch(write_run(tmp_path / "run"), encoding="ascii").stdout


def test_watch_imports_no_torch():
    check = (
        "import sys, job.show.watch.app; sys.exit({'torch', 'horovod'} & set(sys.modules) != set())"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def on_terminal(arguments, *sends):
    """Run mgd-watch on a new terminal. Return its output and exit code.

    sends: (text, count, signal): send the signal when the text has been printed that often.
    Ctrl-C is ignored at the start, as for a shell's background program.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-m", "job.show.watch", *map(str, arguments)])
    shown, deadline, sends = b"", time.monotonic() + 60, list(sends)
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        if sends and shown.count(sends[0][0]) >= sends[0][1]:
            os.kill(pid, sends.pop(0)[2])
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return shown, os.waitstatus_to_exitcode(status)


POSITION, ENTER, LEAVE = b"epoch 1 step 5/10", b"\033[?1049h", b"\033[?1049l"
HIDE_CURSOR, SHOW_CURSOR = b"\033[?25l", b"\033[?25h"


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_signal_restores_the_terminal(tmp_path, number, code):
    arguments = [write_run(tmp_path / "run"), "--every", "0.2"]
    shown, ended = on_terminal(arguments, (POSITION, 1, number))
    assert ended == code and b"Traceback" not in shown
    assert shown.count(ENTER) == shown.count(LEAVE) == 1
    assert shown.index(HIDE_CURSOR) < shown.index(SHOW_CURSOR)
    # Only Ctrl-C leaves the last lines on the first screen.
    assert (POSITION in shown.split(LEAVE)[1]) == (number == signal.SIGINT)


def test_ctrl_z_restores_the_terminal_while_stopped(tmp_path):
    """Without a shell that could continue it, it continues at once."""
    arguments = [write_run(tmp_path / "run"), "--every", "0.2"]
    shown, ended = on_terminal(
        arguments,
        (POSITION, 1, signal.SIGTSTP),
        (ENTER, 2, signal.SIGWINCH),
        (POSITION, 3, signal.SIGINT),
    )
    assert ended == 0 and shown.count(ENTER) == shown.count(LEAVE) == 2


def test_terminal_watch_ends_when_the_run_is_done(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "complete").write_text("done: 4 epochs\n")
    shown, code = on_terminal([run])
    assert code == 0 and b"run: done" in shown
