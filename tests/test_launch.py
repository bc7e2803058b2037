import os
import time

import horovod.torch as hvd
import pytest

from job.errors import RunError
from job.run import launch
from job.run.launch import LAUNCHERS, cores, launched, reported_errors


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """No launcher's variables, and no waiting."""
    for names in LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_without_a_launcher_there_is_one_task():
    assert launched() == ("none", 0, 1)


@pytest.mark.parametrize(
    ("name", "rank", "size"),
    [
        ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
        ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("MPI", "PMI_RANK", "PMI_SIZE"),
    ],
)
def test_a_launcher_is_known_by_its_variables(monkeypatch, name, rank, size):
    monkeypatch.setenv(rank, "3")
    assert launched() == ("none", 0, 1)  # a batch script's shell has a rank, and is no task of a step
    monkeypatch.setenv(size, "8")
    assert launched() == (name, 3, 8)


def test_horovod_s_own_variables_count_before_those_of_what_it_runs_in(monkeypatch):
    for name, value in dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", HOROVOD_RANK="2", HOROVOD_SIZE="4").items():
        monkeypatch.setenv(name, value)
    assert launched() == ("horovodrun", 2, 4)


def ended(capsys, error):
    """The exit code, and what is on stderr, when `error` leaves a program."""
    with pytest.raises(SystemExit) as caught, reported_errors():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    return caught.value.code, err


@pytest.mark.parametrize("code", [2, 1])
def test_an_error_is_one_line_and_its_exit_code(capsys, code):
    assert ended(capsys, RunError("lr 'x': expected a number", code)) == (code, "error: lr 'x': expected a number\n")


def test_a_mistake_of_the_user_s_has_code_two(capsys):
    assert ended(capsys, RunError("no"))[0] == 2


@pytest.mark.parametrize(("rank", "said"), [("0", "error: no\n"), ("1", ""), ("7", "")])
def test_an_error_of_all_ranks_is_said_by_the_first_before_the_others_go(monkeypatch, capsys, unlaunched, rank, said):
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setenv("HOROVOD_SIZE", "8")
    assert ended(capsys, RunError("no", 2)) == (2, said)
    assert bool(unlaunched) == (rank != "0")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("text", ["", "Connection reset\nby a peer\n\nstack"])
def test_another_worker_s_end_is_one_line_of_each_rank(monkeypatch, capsys, rank, text):
    monkeypatch.setenv("HOROVOD_RANK", rank)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    code, err = ended(capsys, hvd.mpi_ops.HorovodInternalError(text))
    assert code == 1
    assert err.count("\n") == 1
    assert "another worker is gone" in err
    assert text.split("\n")[0] in err


def test_without_an_error_nothing_is_said(capsys):
    with reported_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_the_program_s_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), reported_errors():
        raise ZeroDivisionError


@pytest.mark.parametrize(("available", "workers", "share"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)])
def test_a_machine_s_cores_are_shared_by_its_workers(monkeypatch, available, workers, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(available)))
    monkeypatch.setattr(launch.hvd, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.hvd, "local_size", lambda: workers)
    assert cores() == share


def test_before_horovod_runs_all_cores_are_this_process_s(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 6})
    monkeypatch.setattr(launch.hvd, "is_initialized", lambda: False)
    assert cores() == 3


@pytest.fixture
def horovod(monkeypatch):
    """A Horovod that is of as many workers as a test says, without starting one."""

    def of_size(size):
        monkeypatch.setattr(launch.hvd, "init", lambda: None)
        monkeypatch.setattr(launch.hvd, "size", lambda: size)
        monkeypatch.setattr(launch.torch, "set_num_threads", lambda number: None)
        monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(launch, "keep_freed_memory", lambda: None)
        for name in ("HOROVOD_DISABLE_GROUP_FUSION", "HOROVOD_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    return of_size


def test_tasks_that_would_each_be_a_run_of_their_own_are_refused(monkeypatch, horovod):
    horovod(1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(RunError) as caught:
        launch.start()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.code == 2
    assert all(part in message for part in ("Open MPI started 4 tasks", "1 workers", "horovodrun -np 4"))


def test_a_start_sets_what_a_run_of_the_same_bytes_needs_and_keeps_the_user_s_limits(monkeypatch, horovod):
    horovod(1)
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "5")
    assert launch.start().type == "cpu"
    assert os.environ["HOROVOD_DISABLE_GROUP_FUSION"] == "1"
    assert os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] == "5"
    assert int(os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"]) > 60
