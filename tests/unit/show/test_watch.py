"""mgd-watch on folders as runs leave them, on one that grows, on damaged ones, and on a real terminal."""

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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.show.read.tail import Curve
from job.show.watch.panel import ASCII, UNICODE, sparkline
from job.show.watch.state import Progress
from job.show.watch.app import Watch

NOW = "2026-01-02 03:04:05"
BEGUN = time.time()
OPTIONS_GIVEN = {"arch": "resnet18", "epochs": 4, "batch_size": 10, "image_size": 32, "teacher": ""}


def record(step, loss=4.0):
    numbers = {
        "loss": loss,
        "contrastive": loss - 1,
        "distillation": 1.0,
        "accuracy": 10.0,
        "lr": 0.1,
    }
    return {
        "steps": step + 1,
        "epoch": step // 10,
        "step": step % 10,
        **numbers,
        "images_per_s": 20.0,
        "data_wait": 0.1,
    }


def start(epoch=0, step=0, **more):
    """The record of a process that starts there, with two workers."""
    place = {"time": BEGUN, "epoch": epoch, "step": step}
    return {
        "kind": "start",
        **place,
        "options": OPTIONS_GIVEN,
        "workers": 2,
        "nodes": 1,
        "images": 100,
        "steps_an_epoch": 10,
    } | more


def remark(text, kind="warning", **more):
    return {"kind": kind, "time": time.time(), "text": text} | more


def add(folder, *records):
    """Add records to those of a run."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def begin(number, run):
    """What slurm/functions.sh writes to a job's log when a try begins."""
    record = {"kind": "try", "time": 1.8e9, "number": number, "nodes": "node[1-2]", "run": str(run)}
    return f"{NOW} node1: try {number}\n{json.dumps(record)}\n"


def write_run(folder, steps=15, **options):
    """Write a run that has done `steps` steps, with its options, in two files as runs have them."""
    folder.mkdir(parents=True, exist_ok=True)
    options = OPTIONS_GIVEN | options
    (folder / "config.yaml").write_text(json.dumps(options))
    (folder / "metrics.jsonl").write_text("")
    add(folder, start(options=options), *({"kind": "step", **record(n)} for n in range(steps)))
    return folder


def watch(*arguments, **environment):
    command = [sys.executable, "-m", "job.show.watch", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


@given(
    st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan)), max_size=80),
    st.sampled_from([UNICODE[0], ASCII[0]]),
)
def test_a_sparkline_orders_its_marks_as_the_values(values, marks):
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
def test_a_curve_stays_small_and_keeps_the_mean(steps, most):
    curve = Curve(most)
    for step in range(steps):
        curve.add(step, float(step))
    assert len(curve.sums) <= most and len(curve.columns(20)) <= 20
    assert sum(total for total, _ in curve.sums.values()) == steps * (steps - 1) / 2


def test_a_run_in_progress_tells_its_place_and_the_time_left(tmp_path):
    run = Progress(write_run(tmp_path / "run"))
    run.update()
    assert run.state() == "running" and run.place == (1, 5, 10) and run.share == 15 / 40
    assert 10 < run.left() <= 12.5  # 25 steps of half a second
    said = watch(tmp_path / "run").stdout
    assert (
        "38 %, epoch 1 step 5/10, of 4 epochs" in said
        and "batch 10, 2 workers" in said
        and "ratio 0.33" in said
    )


def test_a_run_resumed_with_another_batch_size_is_at_its_epoch_s_start(tmp_path):
    """The queue was filled under the first batch size."""
    folder = write_run(tmp_path / "run", 20)
    before = {"batch_size_before": 10, "steps_an_epoch_before": 10}
    change = {"epoch": 2, "step": 0, "batch_size": 5, "steps_an_epoch": 20, **before}
    options = {"epochs": 4, "batch_size": 5, "moco_k": 40}
    add(folder, start(2, options=options, steps_an_epoch=20), {"kind": "change", **change})
    run = Progress(folder)
    run.update()
    assert run.place == (2, 0, 20) and run.share == 0.5 and run.filled == 4
    add(folder, record(20) | {"step": 0})
    run.update()
    assert run.place == (2, 1, 20) and run.share == (2 + 1 / 20) / 4


def test_only_what_is_new_is_read_and_a_replaced_file_is_read_anew(tmp_path):
    run = Progress(write_run(tmp_path / "run"))
    run.update()
    before = run.metrics.offset
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write(json.dumps(record(15)) + '\n{"steps": 17')
    run.update()
    assert (
        run.records.count == 16 and run.metrics.offset == before + len(json.dumps(record(15))) + 1
    )
    (tmp_path / "new").write_text(json.dumps(record(0)) + "\n")
    os.replace(tmp_path / "new", tmp_path / "run/metrics.jsonl")  # as a resumed run does
    run.update()
    assert run.records.count == 1 and run.place[:2] == (0, 1)


def test_the_checkpoint_shown_is_the_newest_by_name_where_last_is_a_copy(tmp_path):
    run = Progress(write_run(tmp_path / "run"))
    for name, size in {"checkpoint_0001_000000": 1, "checkpoint_0002_000000": 2, "last": 3}.items():
        (tmp_path / "run" / f"{name}.pth.tar").write_bytes(bytes(size))
    name, _, size = run.checkpoint()
    assert (name, size) == ("checkpoint_0002_000000.pth.tar", 2)


@pytest.mark.parametrize(
    ("how", "state"), [("stopped", "stopped"), ("error", "error"), ("complete", "done")]
)
def test_the_end_is_the_state_until_a_new_process_starts(tmp_path, how, state):
    folder = write_run(tmp_path / "run")
    run = Progress(folder)
    add(folder, {"kind": "end", "time": time.time(), "how": how, "text": "no disk", "code": 0})
    run.update()
    assert run.state() == state and ("error: no disk" in run.records.warnings) == (how == "error")
    add(folder, start(1, 5), {"kind": "resumed", "time": time.time(), "epoch": 1, "step": 5})
    run.update()
    assert run.state() == "running" and run.records.resumed == 1 and not run.records.warnings
    shown = " ".join(watch(folder).stdout.split())
    assert "run: running" in shown and "resumed once" in shown and "error" not in shown


def test_the_last_warnings_are_shown_each_once_with_its_age(tmp_path):
    folder = write_run(tmp_path / "run")
    add(
        folder,
        *(
            remark(f"slow disk, {number} s", kind) | {"time": time.time() - 1200}
            for number in (1, 2)
            for kind in ("hint", "warning")
        ),
    )
    shown = " ".join(watch(folder).stdout.split())
    assert (
        shown.count("slow disk") == 2
        and "hint: slow disk, 2 s (20 min ago)" in shown
        and "warning: slow disk, 2 s" in shown
    )


def test_remarks_of_one_id_are_shown_once_and_the_last_of_them(tmp_path):
    folder = write_run(tmp_path / "run")
    add(
        folder,
        *(remark(text, id="wait") for text in ("slow images", "half of the time")),
        remark("slow images", "hint", id="wait"),
    )
    run = Progress(folder)
    run.update()
    assert [text for _, text in run.records.warnings.values()] == [
        "warning: half of the time",
        "hint: slow images",
    ]


def test_the_time_left_counts_what_comes_between_epochs(tmp_path):
    """A save at an epoch's end, a k-NN accuracy and a refresh; a save within an epoch is in the time of a step."""
    folder = write_run(tmp_path / "run", teacher="x", refresh_epochs="every:1")
    run = Progress(folder)
    run.update()
    before = run.left()
    saves = (
        {"kind": "saved", "time": 1.0, "epoch": 1, "step": step, "path": "x", "seconds": 3.0}
        for step in (0, 4)
    )
    took = {"measuring": 50.0, "gathering": 10.0, "solving": 5.0}
    refreshes = (
        {"kind": "refresh", "epoch": 1, "step": 0, "stage": stage, "changed": 0.5, **took}
        for stage in (3, 4)
    )
    add(folder, *saves, {"kind": "knn", "epoch": 1, "knn": 50.0, "knn_seconds": 4.0}, *refreshes)
    run.update()
    assert run.left() - before == pytest.approx(
        3 * 7 + 2 * 65, abs=2
    )  # the ends of epochs 1 to 3, refreshes before 2 and 3


def test_the_refresh_of_two_distillers_is_shown_for_each(tmp_path):
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
    shown = " ".join(watch(folder).stdout.split())
    header = "matching refresh 1, before epoch 1, 10.0 s"
    one, two = (
        f"d{n} layer3 layer4 changed {10 * n} % {10 * n} % cost 0.500 0.500" for n in (1, 2)
    )
    assert f"{header} {one} {two}" in shown
    del refresh["cost_after"]
    add(folder, refresh | {"epoch": 2, "distiller": "d2", "stage": 4, "changed": 0.3})
    shown = " ".join(watch(folder).stdout.split())
    one = "d1 layer3 layer4 before epoch 1 changed 10 % 10 % cost 0.500 0.500"
    assert f"matching refresh 2, before epoch 2, 5.0 s {one} d2 layer4 changed 30 %" in shown
    assert shown.count("cost") == 1


def test_a_run_of_an_earlier_version_is_shown_by_its_numbers(tmp_path):
    """Its records have no kinds, and its options are in config.yaml only."""
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record(step)) + "\n" for step in range(15))
    )
    run = Progress(folder)
    run.update()
    assert run.state() == "running" and run.place == (1, 5, 10) and run.share == 15 / 40
    shown = watch(folder).stdout
    assert (
        "epoch 1 step 5/10, of 4 epochs" in shown and "resnet18" in shown and "damaged" not in shown
    )


def test_the_steps_of_an_epoch_are_shown_once_they_are_known(tmp_path):
    """In its first epoch, a run of an earlier version has no record of them."""
    folder = write_run(tmp_path / "run", epochs=1)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record(step)) + "\n" for step in range(3))
    )
    assert re.search(r"  epoch 0 step 3, of 1 epochs\n", watch(folder).stdout)
    (folder / "complete").write_text("done\n")
    assert "100 %, epoch 0 step 3/3, of 1 epochs\n" in watch(folder).stdout


def test_a_run_without_a_step_shows_the_last_line_of_its_log(tmp_path):
    folder = write_run(tmp_path / "run", steps=0)
    assert "empty so far" in watch(folder).stdout
    (folder / "log.txt").write_text(f"{NOW} one\n{NOW} measuring the loss factor\n")
    assert re.search("log +measuring the loss factor\n", watch(folder).stdout)


def test_a_run_without_news_is_stale_and_one_without_steps_waits(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "config.yaml"):
        os.utime(run / name, (time.time() - 720,) * 2)
    assert "run: no news for 12 min: stopped, or waiting" in watch(run).stdout
    (run / "metrics.jsonl").unlink()
    os.utime(run / "config.yaml")
    assert "run: starting: waits for its first step" in watch(run).stdout


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff garbage\n"])
def test_an_empty_or_damaged_folder_is_one_line_and_exit_code_2(tmp_path, content):
    if content is not None:
        for name in ("metrics.jsonl", "config.yaml", "log.txt"):
            (tmp_path / name).write_bytes(content)
    ended = watch(tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert (
        ended.stderr.startswith(f"error: {tmp_path} holds no run") and ended.stderr.count("\n") == 1
    )


def test_a_job_s_log_leads_to_its_run_and_tells_its_tries(tmp_path):
    run = write_run(tmp_path / "runs" / "mgd-train-1")
    log = tmp_path / "mgd-train-1.log"
    begun = [begin(number, run) for number in (1, 2)]
    log.write_text(f"{begun[0]}{NOW} node1: any sentence\n{begun[1]}{NOW} node1: another\n")
    for path in (log, tmp_path):
        said = " ".join(watch(path).stdout.split())
        assert "try 2 on node[1-2] said: node1: another" in said and "epoch 1 step 5/10" in said


@pytest.mark.parametrize(
    ("status", "shown"),
    [({}, "decision: limit said:"), ({"status": 1}, "decision: limit, exit status 1 said:")],
)
def test_the_decision_about_a_job_is_shown_until_its_next_try(tmp_path, status, shown):
    run, log = write_run(tmp_path / "run"), tmp_path / "mgd-train-1.log"
    decision = {"kind": "decision", "time": 1.8e9, "reason": "limit"} | status
    log.write_text(f"{begin(1, run)}{json.dumps(decision)}\n{NOW} node1: any sentence\n")
    assert f"job try 1 on node[1-2] {shown} node1: any sentence" in " ".join(
        watch(log).stdout.split()
    )
    with open(log, "a") as file:
        file.write(begin(2, run))
    assert "decision: " not in watch(log).stdout


@pytest.mark.parametrize("rank", ["", "rank 0 on node1: "])
def test_an_error_in_the_job_s_log_and_in_the_run_s_records_is_shown_once(tmp_path, rank):
    run, log = write_run(tmp_path / "run"), tmp_path / "mgd-train-1.log"
    add(run, {"kind": "end", "time": time.time(), "how": "error", "text": "no disk", "code": 1})
    log.write_text(f"{begin(1, run)}error: {rank}no disk\n")
    assert watch(log).stdout.count("no disk") == 1
    with open(log, "a") as file:
        file.write("error: batch: not requeued: no scontrol\n")
    shown = watch(log).stdout
    assert shown.count("no disk") == 1 and "error: batch: not requeued: no scontrol" in shown


def test_a_job_s_log_of_an_earlier_version_leads_to_its_run(tmp_path):
    """It has sentences in place of records."""
    run, log = write_run(tmp_path / "run"), tmp_path / "mgd-train-1.log"
    log.write_text(
        f"{NOW} node1: try 1 on node1, runtime none: python\n{NOW} node1: run's folder: {run}\n"
    )
    assert "epoch 1 step 5/10" in watch(log).stdout


def test_several_runs_are_shown_in_the_order_of_their_numbers(tmp_path):
    for name in ("10", "2"):
        write_run(tmp_path / "array" / name)
    said = watch(tmp_path / "array").stdout
    assert (
        said.index("array/2: running") < said.index("array/10: running")
        and len(said.splitlines()) < 14
    )


@pytest.mark.parametrize(
    "said",
    [
        "",
        f"{NOW} node1: data: copying data.tar (147G) to /tmp, 800G free\n",
        "error: node1: no disk\n",
    ],
)
def test_a_job_that_has_not_begun_its_run_waits(tmp_path, said):
    log, run = tmp_path / "mgd-train-1.log", tmp_path / "run"
    log.write_text(said)
    ended = watch(log)
    assert ended.returncode == 0 and "mgd-train-1.log: waits for its first try" in ended.stdout
    assert said.removeprefix(f"{NOW} ").strip() in ended.stdout
    run.mkdir()
    with open(log, "a") as file:
        file.write(begin(1, run))
    said = watch(log).stdout
    assert (
        f"{run.name}: waits for its first step" in said
        and "try 1 on node[1-2]" in said
        and "error" not in said
    )
    write_run(run)
    assert f"{run.name}: running" in watch(log).stdout


def test_a_file_that_is_no_job_s_log_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "notes.log").write_bytes(b"\x00\xff to do\n")
    ended = watch(tmp_path / "notes.log")
    assert (
        ended.returncode == 2
        and "names no run's folder" in ended.stderr
        and ended.stderr.count("\n") == 1
    )


def damage(run, how):
    if how == "garbage":
        for name in ("metrics.jsonl", "config.yaml", "log.txt"):
            (run / name).write_bytes(b"\x00\xff garbage\n")
    else:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()  # it cannot be read, not even by root


@pytest.mark.parametrize(
    ("how", "said"),
    [("garbage", "2 holds no run: "), ("unreadable", "2/metrics.jsonl: Is a directory")],
)
def test_a_damaged_run_among_several_is_a_line_and_the_others_are_shown(
    tmp_path, monkeypatch, how, said
):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "array" / name) for name in ("1", "2", "3")]
    damage(runs[1], how)
    ended = watch("array", "--once")
    blocks = ended.stdout.split("\n\n")
    assert (
        ended.returncode == 0
        and len(blocks) == 3
        and blocks[1].startswith(f"array/{said}")
        and "\n" not in blocks[1]
    )
    assert "array/1: running" in blocks[0] and "array/3: running" in blocks[2]
    alone = watch("array/2")
    assert alone.returncode == 2 and alone.stdout == "" and alone.stderr.count("\n") == 1


def test_a_run_that_cannot_be_read_any_more_stays_with_a_line_that_says_why(tmp_path):
    shown = Watch([write_run(tmp_path / "run")])
    shown.begin()
    damage(tmp_path / "run", "unreadable")
    shown.look()
    said = "\n".join(shown.lines(200, UNICODE, False))
    assert "epoch 1 step 5/10" in said and "run/metrics.jsonl: Is a directory" in said
    (tmp_path / "run/metrics.jsonl").rmdir()
    write_run(tmp_path / "run", 16)
    shown.look()
    said = "\n".join(shown.lines(200, UNICODE, False))
    assert "epoch 1 step 6/10" in said and "Is a directory" not in said


def test_runs_are_found_as_they_begin_and_kept_when_their_folder_is_away(tmp_path):
    shown = Watch([tmp_path / "array"])
    write_run(tmp_path / "array" / "1")
    shown.begin()
    write_run(tmp_path / "array" / "0")
    shown.look()
    assert [line for line in shown.lines(80, UNICODE, False) if line.endswith(": running")][
        0
    ].endswith("array/0: running")
    (tmp_path / "array").rename(tmp_path / "away")
    shown.look()
    assert (
        sum(
            "holds no run" in line or "no such f" in line
            for line in shown.lines(200, UNICODE, False)
        )
        == 3
    )


def test_the_loss_is_shown_from_when_keys_fill_the_queue(tmp_path):
    run = write_run(tmp_path / "run", 0, moco_k=40)
    add(run, *(record(step, 0.5 if step < 3 else 9.0 - step / 10) for step in range(20)))
    assert re.search(r" highest 8.7, least 7.1$", watch(run).stdout, re.MULTILINE)


def test_a_reader_that_goes_ends_it_without_a_word(tmp_path):
    write_run(tmp_path / "run")
    line = f"{sys.executable} -m job.show.watch run --every 0.1 | head -1"  # a longer path would be cut to the terminal's width
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
    ("options", "words"),
    [({}, "resnet18, no teacher"), ({"width": 16}, "resnet18 of width 16, no teacher")],
)
def test_a_run_tells_its_network_and_its_width_where_that_is_not_as_published(
    tmp_path, options, words
):
    run = write_run(tmp_path / "run", **options)
    assert re.search(rf"^ *run +{words}$", watch(run).stdout, re.MULTILINE)


def test_several_runs_tell_the_options_in_which_they_differ(tmp_path):
    for name, factor in (("1", 100), ("2", 1000)):
        write_run(tmp_path / "array" / name, loss_factor=factor)
    lines = watch(tmp_path / "array").stdout.splitlines()
    assert (
        "  loss_factor 100" in lines
        and "  loss_factor 1000" in lines
        and "resnet18" not in "".join(lines)
    )


def test_an_end_that_is_years_away_has_its_year(tmp_path):
    run = write_run(tmp_path / "run", epochs=20000000)  # 2e8 steps of half a second
    year = time.localtime(time.time() + 1e8).tm_year
    assert re.search(rf"1157 d .* left, until \d\d \w+ {year}$", watch(run).stdout, re.MULTILINE)


def test_an_epoch_that_none_can_be_makes_no_bar_of_that_length(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(20) | {"epoch": -(10**9)}) + "\n")
    assert max(map(len, watch(run).stdout.splitlines())) < 200


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 4]))
NAMES = "steps epoch step stage loss contrastive distillation accuracy top1 lr images_per_s"
NAMES += " data_wait changed cost_after knn val_top1"
NAMES = [*NAMES.split(), "feature_std", "queue_rank", "dead_layer1", "refreshes"]
OPTIONS = "epochs batch_size arch teacher pretrained image_size refresh_epochs loss_factor".split()


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), NUMBERS), max_size=6),
    st.lists(st.text(max_size=200), max_size=4),
    st.dictionaries(
        st.sampled_from(OPTIONS), st.one_of(NUMBERS, st.text(), st.lists(st.integers()))
    ),
    st.integers(20, 120),
    st.sampled_from([UNICODE, ASCII]),
)
@settings(max_examples=100, deadline=None)
def test_whatever_files_say_no_line_is_wider_than_the_terminal(
    tmp_path_factory, records, texts, options, width, marks
):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("1", "2"):
        run = write_run(folder / name)
        add(run, *(record(20 + number) | other for number, other in enumerate(records)), *records)
        add(run, *map(remark, texts), start(options=options | {"name": name * 200}))
    for path in (folder, folder / "1"):
        shown = Watch([path])
        shown.begin()
        lines = shown.lines(width, marks, False)
        columns = [
            sum(2 if unicodedata.east_asian_width(mark) in "FW" else 1 for mark in line)
            for line in lines
        ]
        assert max(columns) <= width and all(line.isprintable() for line in lines)


def test_an_encoding_without_blocks_gets_ascii(tmp_path):
    assert watch(write_run(tmp_path / "run"), PYTHONIOENCODING="ascii").stdout.isascii()


def test_no_torch_is_imported():
    check = "import sys, job.show.watch; sys.exit(any(name in sys.modules for name in ('torch', 'horovod')))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def on_terminal(arguments, *sends):
    """Run the program on a terminal of its own, and send it signals: (what is shown before, how often, the signal).

    Return what came and the exit code. It starts as a shell's background does: with Ctrl-C ignored.
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


PLACE, BEGINS, LEAVES = b"epoch 1 step 5/10", b"\033[?1049h", b"\033[?1049l"


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_leaves_the_terminal_in_order(tmp_path, number, code):
    shown, ended = on_terminal([write_run(tmp_path / "run"), "--every", "0.2"], (PLACE, 1, number))
    assert ended == code and b"Traceback" not in shown
    assert shown.count(BEGINS) == shown.count(LEAVES) == 1 and shown.index(
        b"\033[?25l"
    ) < shown.index(b"\033[?25h")
    assert (PLACE in shown.split(LEAVES)[1]) == (
        number == signal.SIGINT
    )  # then the last picture stays


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(tmp_path):
    """Without a shell that could let it go on, it does so by itself."""
    arguments = [write_run(tmp_path / "run"), "--every", "0.2"]
    shown, ended = on_terminal(
        arguments,
        (PLACE, 1, signal.SIGTSTP),
        (BEGINS, 2, signal.SIGWINCH),
        (PLACE, 3, signal.SIGINT),
    )
    assert ended == 0 and shown.count(BEGINS) == shown.count(LEAVES) == 2


def test_on_a_terminal_it_ends_when_the_run_is_done(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "complete").write_text("done: 4 epochs\n")
    shown, code = on_terminal([run])
    assert code == 0 and b"run: done" in shown
