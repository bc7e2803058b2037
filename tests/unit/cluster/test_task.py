"""This process as a task of its launcher, and its cores."""

import os

import pytest

from job.cluster import comm
from job.cluster.task import cores, launched

pytestmark = pytest.mark.usefixtures("unlaunched")


def test_launched_without_a_launcher_is_one_task():
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
def test_launched_detects_the_launcher(monkeypatch, name, rank, size):
    monkeypatch.setenv(rank, "3")
    assert launched() == ("none", 0, 1)  # the shell of a batch script has a rank, but no size
    monkeypatch.setenv(size, "8")
    assert launched() == (name, 3, 8)


def test_launched_prefers_horovodrun_inside_srun(monkeypatch):
    variables = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    variables |= {"HOROVOD_RANK": "2", "HOROVOD_SIZE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == ("horovodrun", 2, 4)


@pytest.mark.parametrize(
    ("available", "workers", "expected"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)]
)
def test_cores_are_divided_among_workers(monkeypatch, available, workers, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(available)))
    monkeypatch.setattr(comm, "local_size", lambda: workers)
    assert cores() == expected


def test_cores_of_a_slurm_task_are_not_divided_again(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(comm, "local_size", lambda: 4)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert cores() == 2  # horovodrun with 4 workers in a job of one task
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert cores() == 8
    for name, value in {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "4", "MGD_LAUNCHER": "srun"}.items():
        monkeypatch.setenv(name, value)
    assert cores() == 8  # variables that the start under srun has set


def test_cores_before_horovod_starts_are_all(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 6})
    assert cores() == 3
