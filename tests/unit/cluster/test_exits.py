"""The end of a worker: error lines, exit codes and waits."""

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
    """Replace waits. Return the list of their seconds."""
    seconds, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(time, "sleep", seconds.append)
    yield seconds
    signal.signal(signal.SIGTERM, before)


def ended(capsys, error):
    """Return exit code and stderr of a program that ends with `error`."""
    with pytest.raises(SystemExit) as caught, reported_errors():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    return caught.value.code, err


def set_rank_3(monkeypatch):
    variables = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "SLURMD_NODENAME": "node2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def set_task_of_srun(monkeypatch, rank, size="4"):
    variables = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURMD_NODENAME": "node2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("code", [2, 1])
def test_error_is_one_line_with_its_exit_code(capsys, code):
    assert ended(capsys, RunError("lr 'x': expected a number", code)) == (
        code,
        "error: lr 'x': expected a number\n",
    )


def test_run_error_has_exit_code_2(capsys):
    assert ended(capsys, RunError("no"))[0] == 2


def test_error_before_horovod_starts_names_the_rank(monkeypatch, capsys, waited):
    set_rank_3(monkeypatch)
    assert ended(capsys, RunError("no", 2)) == (2, "error: rank 3 on node2: no\n")
    assert waited[0] > 2


@pytest.mark.parametrize("error", [RunError("no"), StartError("no")], ids=["run", "start"])
@pytest.mark.parametrize("rank", ["0", "3"])
def test_error_has_its_code_at_sigterm(monkeypatch, capsys, error, rank):
    """srun's exit code is the highest of all ranks, and SIGTERM would count as 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    set_task_of_srun(monkeypatch, rank)
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, line = ended(capsys, error)
    assert (code, bool(line)) == (2, rank == "0")


ENDED_IN_CLEANUP = """
import os, signal, time
from job.cluster import exits
from job.cluster.comm import WorkerGone
from job.errors import RunError, StartError

class Cleanup:
    def __del__(self, write=os.write, kill=os.kill, own=os.getpid(), number=signal.SIGTERM):
        write(1, b"cleanup ")
        kill(own, number)

cleanup, exits.PATIENCE, time.sleep = Cleanup(), 0, lambda seconds: None
with exits.reported_errors():
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [('RunError("no")', 2), ('StartError("no")', 2), ('WorkerGone("no")', 1), ("KeyError(3)", 1)],
)
@pytest.mark.parametrize("rank", ["0", "3"])
def test_error_has_its_code_at_sigterm_in_cleanup(monkeypatch, error, code, rank):
    """Python resets handled signals to their default before its cleanup."""
    set_task_of_srun(monkeypatch, rank)
    command = [sys.executable, "-c", ENDED_IN_CLEANUP.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "cleanup "), done.stderr


@pytest.mark.parametrize(("connected", "rank"), [(False, "0"), (True, "0"), (True, "1")])
def test_rank_0_waits_for_slower_ranks_of_srun(monkeypatch, capsys, waited, connected, rank):
    """Otherwise srun would end them before they have the error's exit code."""
    set_task_of_srun(monkeypatch, rank)
    monkeypatch.setattr(comm, "size", lambda: 4 if connected else 1)
    assert ended(capsys, RunError("no", 2)) == (2, "" if rank == "1" else "error: no\n")
    assert waited[0] == 2


@pytest.mark.parametrize(("rank", "line"), [("0", "error: no\n"), ("1", ""), ("7", "")])
def test_common_error_is_printed_by_rank_0(monkeypatch, capsys, waited, rank, line):
    """The other ranks wait before they end."""
    monkeypatch.setattr(comm, "size", lambda: 8)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setenv("HOROVOD_SIZE", "8")
    assert ended(capsys, RunError("no", 2)) == (2, line)
    assert bool(waited) == (rank != "0")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("text", ["", "Connection reset\nby a peer\n\nstack"])
def test_end_of_another_worker_is_one_line(monkeypatch, capsys, rank, text):
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    code, err = ended(capsys, comm.WorkerGone(text))
    assert code == 1
    assert err.count("\n") == 1
    assert "another worker is gone" in err
    assert text.split("\n")[0] in err


def test_end_of_another_worker_is_recorded(capsys, tmp_path):
    def peer_ended():
        with Run(str(tmp_path), keep=1) as run:
            run.log.open(str(tmp_path), (0, 0))
            raise comm.WorkerGone("connection closed by peer\nmore")

    with pytest.raises(SystemExit), reported_errors():
        peer_ended()
    end = json.loads((tmp_path / "metrics.jsonl").read_text())
    printed = capsys.readouterr().err
    assert (end["how"], end["code"]) == ("error", 1) and printed == f"error: {end['text']}\n"


def test_success_prints_no_line(capsys):
    with reported_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_unexpected_error_has_traceback_rank_and_node(monkeypatch, capsys):
    set_rank_3(monkeypatch)
    code, err = ended(capsys, ZeroDivisionError("by zero"))
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: rank 3 on node2: ZeroDivisionError: by zero\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_start_error_of_a_task_follows_rank_0(monkeypatch, capsys, waited, rank):
    """And rank 0 waits for slower ranks."""
    set_task_of_srun(monkeypatch, rank)
    line = f"error: rank {rank} on node2: no way\n"
    assert ended(capsys, StartError("no way", code=1)) == (1, line)
    assert waited == [exits.PATIENCE if rank == "1" else 2]


@pytest.mark.parametrize("launcher", ["none", "srun", "horovodrun"])
def test_rank_0_of_others_ends_at_once(monkeypatch, capsys, waited, launcher):
    """A single task, or a task of horovodrun, whose exit code is the first failed worker's."""
    if launcher == "srun":
        set_task_of_srun(monkeypatch, "0", size="1")
    if launcher == "horovodrun":
        monkeypatch.setenv("HOROVOD_RANK", "0")
        monkeypatch.setenv("HOROVOD_SIZE", "4")
    assert [ended(capsys, error("no"))[0] for error in (RunError, StartError)] == [2, 2]
    assert waited == []


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
print("noted:", stop.signal is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patience", "seconds", "code", "output"),
    [
        (0.01, 3600, 1, "rank 0 on here: ended by SIGTERM before all workers had started"),
        (3600, 0, 0, "noted: True"),
    ],
    ids=["late", "in time"],
)
def test_signal_ends_the_wait_for_workers(monkeypatch, patience, seconds, code, output):
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    program = SIGNALLED.format(patience=patience, seconds=seconds)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (code, f"{output}\n", "")


@pytest.mark.parametrize(
    ("nccl", "initialized", "at_once"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_leave_is_immediate_with_communicators(monkeypatch, capsys, nccl, initialized, at_once):
    ends = []
    monkeypatch.setattr(comm, "has_nccl", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(sys, "exit", lambda code: ends.append(("sys.exit", code)))
    monkeypatch.setattr(os, "_exit", lambda code: ends.append(("os._exit", code)))
    print("the last line", end="")
    exits.leave(3)
    assert ends[0] == ("os._exit" if at_once else "sys.exit", 3)
    assert capsys.readouterr().out == "the last line"
