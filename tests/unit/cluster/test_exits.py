"""How a worker ends: lines, exit codes, waits."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from job.cluster import comm, exits
from job.cluster.exits import reported_errors
from job.engine.run import Run
from job.errors import RunError, StartError


@pytest.fixture(autouse=True)
def waited(monkeypatch, unlaunched):
    """No waiting; the seconds of the waits."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def ended(capsys, error):
    """The exit code, and what is on stderr, when `error` leaves a program."""
    with pytest.raises(SystemExit) as caught, reported_errors():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    return caught.value.code, err


@pytest.mark.parametrize("code", [2, 1])
def test_an_error_is_one_line_and_its_exit_code(capsys, code):
    assert ended(capsys, RunError("lr 'x': expected a number", code)) == (
        code,
        "error: lr 'x': expected a number\n",
    )


def test_a_mistake_of_the_user_s_has_code_two(capsys):
    assert ended(capsys, RunError("no"))[0] == 2


def test_before_horovod_is_up_an_error_may_be_one_rank_s_alone(monkeypatch, capsys, waited):
    for name, value in {
        "HOROVOD_RANK": "3",
        "HOROVOD_SIZE": "4",
        "SLURMD_NODENAME": "node2",
    }.items():
        monkeypatch.setenv(name, value)
    assert ended(capsys, RunError("no", 2)) == (2, "error: rank 3 on node2: no\n")
    assert waited[0] > 2


@pytest.mark.parametrize(("rank", "said"), [("0", "error: no\n"), ("1", ""), ("7", "")])
def test_an_error_of_all_ranks_is_said_by_the_first_before_the_others_go(
    monkeypatch, capsys, waited, rank, said
):
    monkeypatch.setattr(comm, "size", lambda: 8)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setenv("HOROVOD_SIZE", "8")
    assert ended(capsys, RunError("no", 2)) == (2, said)
    assert bool(waited) == (rank != "0")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("text", ["", "Connection reset\nby a peer\n\nstack"])
def test_another_worker_s_end_is_one_line_of_each_rank(monkeypatch, capsys, rank, text):
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    code, err = ended(capsys, comm.WorkerGone(text))
    assert code == 1
    assert err.count("\n") == 1
    assert "another worker is gone" in err
    assert text.split("\n")[0] in err


def test_another_worker_s_end_is_recorded_as_it_is_printed(capsys, tmp_path):
    def gone():
        with Run(str(tmp_path), keep=1) as run:
            run.log.open(str(tmp_path), (0, 0))
            raise comm.WorkerGone("connection closed by peer\nmore")

    with pytest.raises(SystemExit), reported_errors():
        gone()
    end = json.loads((tmp_path / "metrics.jsonl").read_text())
    printed = capsys.readouterr().err
    assert (end["how"], end["code"]) == ("error", 1) and printed == f"error: {end['text']}\n"


def test_without_an_error_nothing_is_said(capsys):
    with reported_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_the_program_s_keeps_its_traceback_and_ends_with_its_rank_and_node(
    monkeypatch, capsys
):
    for name, value in {
        "HOROVOD_RANK": "3",
        "HOROVOD_SIZE": "4",
        "SLURMD_NODENAME": "node2",
    }.items():
        monkeypatch.setenv(name, value)
    code, err = ended(capsys, ZeroDivisionError("by zero"))
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: rank 3 on node2: ZeroDivisionError: by zero\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_one_task_s_start_is_said_by_it_alone_after_rank_0_had_time_to_speak(
    monkeypatch, capsys, waited, rank
):
    for name, value in {
        "SLURM_PROCID": rank,
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURMD_NODENAME": "node2",
    }.items():
        monkeypatch.setenv(name, value)
    assert ended(capsys, StartError("no way", code=1)) == (
        1,
        f"error: rank {rank} on node2: no way\n",
    )
    assert bool(waited) == (rank != "0")


SIGNALLED = """
import os, signal, time
from job.cluster import exits
from job.cluster.stop import Stop

stop = Stop()
exits.PATIENCE = {patience}
with exits.left_at_signals():
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({seconds})
print("the first step will obey:", stop.signal is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patience", "seconds", "code", "said"),
    [
        (0.01, 3600, 1, "rank 0 on here: ended by SIGTERM before all workers had started"),
        (3600, 0, 0, "the first step will obey: True"),
    ],
    ids=["in vain", "in time"],
)
def test_a_signal_ends_the_wait_for_workers_that_do_not_start(
    monkeypatch, patience, seconds, code, said
):
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    program = SIGNALLED.format(patience=patience, seconds=seconds)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, f"{said}\n", "")


@pytest.mark.parametrize(
    ("nccl", "initialized", "at_once"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_with_communicators_a_program_ends_at_once(monkeypatch, capsys, nccl, initialized, at_once):
    ends = []
    monkeypatch.setattr(comm, "has_nccl", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(sys, "exit", lambda code: ends.append(("sys.exit", code)))
    monkeypatch.setattr(os, "_exit", lambda code: ends.append(("os._exit", code)))
    print("the last line", end="")
    exits.leave(3)
    assert ends[0] == ("os._exit" if at_once else "sys.exit", 3)
    assert capsys.readouterr().out == "the last line"
