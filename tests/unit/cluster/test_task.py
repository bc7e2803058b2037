"""This process as a task of its launcher: the launcher, and its share of the machine's cores."""

import os

import pytest

from job.cluster import comm
from job.cluster.task import cores, launched

pytestmark = pytest.mark.usefixtures("unlaunched")


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
    assert launched() == (
        "none",
        0,
        1,
    )  # a batch script's shell has a rank, and is no task of a step
    monkeypatch.setenv(size, "8")
    assert launched() == (name, 3, 8)


def test_horovod_s_own_variables_count_before_those_of_what_it_runs_in(monkeypatch):
    for name, value in dict(
        SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", HOROVOD_RANK="2", HOROVOD_SIZE="4"
    ).items():
        monkeypatch.setenv(name, value)
    assert launched() == ("horovodrun", 2, 4)


@pytest.mark.parametrize(
    ("available", "workers", "share"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)]
)
def test_a_machine_s_cores_are_shared_by_its_workers(monkeypatch, available, workers, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(available)))
    monkeypatch.setattr(comm, "local_size", lambda: workers)
    assert cores() == share


def test_the_cores_that_slurm_gives_to_a_task_are_not_shared_again(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(comm, "local_size", lambda: 4)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert cores() == 2  # of horovodrun's workers, in a job of one task
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert cores() == 8
    for name, value in {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "4", "MGD_LAUNCHER": "srun"}.items():
        monkeypatch.setenv(name, value)
    assert cores() == 8  # the variables are those that the start has set


def test_before_horovod_runs_all_cores_are_this_process_s(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 6})
    assert cores() == 3
