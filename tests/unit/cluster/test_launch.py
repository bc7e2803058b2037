"""The start of a worker: launchers, GPUs and Horovod's settings."""

import os
import sys

import psutil
import pytest

import job.cluster
from job.cluster import launch
from job.errors import RunError
from job.engine.run import Run

pytestmark = pytest.mark.usefixtures("unlaunched")

SET_AT_START = [
    "HOROVOD_" + name
    for name in (
        "FUSION_THRESHOLD CYCLE_TIME ENABLE_ASYNC_COMPLETION STALL_CHECK_DISABLE "
        "STALL_CHECK_TIME_SECONDS STALL_SHUTDOWN_TIME_SECONDS GLOO_TIMEOUT_SECONDS"
    ).split()
]


def test_one_worker_opens_no_port(tmp_path):
    before = psutil.Process().net_connections()
    with Run(str(tmp_path), keep=1):
        assert psutil.Process().net_connections() == before


@pytest.fixture
def horovod(monkeypatch):
    """A function that simulates a Horovod of `size` workers."""

    def of_size(size):
        monkeypatch.setattr(launch.comm, "start", lambda: None)
        monkeypatch.setattr(launch.comm, "size", lambda: size)
        monkeypatch.setattr(launch.torch, "set_num_threads", lambda number: None)
        monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(launch.objects, "allgather", lambda mine, name: [mine] * size)
        monkeypatch.setattr(launch.same_start, "check", lambda *arguments, **named: None)
        for name in SET_AT_START:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    return of_size


def test_unconnected_tasks_are_refused(monkeypatch, horovod):
    horovod(1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(RunError) as caught:
        launch.start({})
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.code == 2
    expected = ("Open MPI started 4 tasks", "1 workers", "horovodrun -np 4")
    assert all(text in message for text in expected)


@pytest.mark.parametrize(
    ("variables", "size", "problem"),
    [
        (
            dict(HOROVOD_RANK="0", HOROVOD_SIZE="4", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="4"),
            4,
            "each a horovodrun of 4 workers",
        ),
        (
            dict(SLURM_PROCID="0", SLURM_NTASKS="4"),
            1,
            "the SLURM job has 4 tasks, but Horovod has 1 worker",
        ),
        (
            dict(HOROVOD_RANK="0", HOROVOD_SIZE="2"),
            1,
            "horovodrun started 2 tasks, but Horovod has 1 workers",
        ),
    ],
)
def test_more_tasks_than_workers_are_refused(monkeypatch, horovod, variables, size, problem):
    horovod(size)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError) as caught:
        launch.start({})
    assert problem in str(caught.value)


def test_unresolvable_hostname_is_refused(monkeypatch, horovod):
    horovod(2)
    for name, value in {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.socket, "gethostname", lambda: "nowhere.invalid")
    problem = r"own name, nowhere.invalid, does not resolve\. Add it to /etc/hosts"
    with pytest.raises(RunError, match=problem):
        launch.start({})


@pytest.mark.parametrize(
    "names", [("HOROVOD_RANK", "HOROVOD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
)
def test_several_workers_without_horovod_are_refused(monkeypatch, names):
    """With srun the check is before the rendezvous, which needs Horovod."""
    for name, value in zip(names, ("0", "2"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.delitem(sys.modules, "job.cluster.rendezvous", raising=False)
    monkeypatch.delattr(job.cluster, "rendezvous", raising=False)
    with pytest.raises(RunError, match="^Horovod is not installed for this Python") as caught:
        launch.start({})
    assert caught.value.code == 2


def test_horovodrun_can_run_in_one_slurm_task(monkeypatch, horovod):
    horovod(8)
    for name, value in dict(
        HOROVOD_RANK="0", HOROVOD_SIZE="8", SLURM_PROCID="0", SLURM_NTASKS="1"
    ).items():
        monkeypatch.setenv(name, value)
    launch.start({})


@pytest.mark.parametrize(
    ("warn", "end", "expected"),
    [
        (None, None, (60, 900)),
        ("5", "20", (5, 20)),
        ("2000", None, (2000, 2000)),
        (None, "10", (60, 60)),
    ],
)
def test_gloo_waits_longer_than_the_watchdog(monkeypatch, horovod, warn, end, expected):
    horovod(1)
    for name, value in {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": warn,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": end,
    }.items():
        if value:
            monkeypatch.setenv(name, value)
    assert launch.patience() == expected
    assert int(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]) > expected[1]


def gpus(monkeypatch, visible, workers, local_rank):
    """Return the device of a worker with `visible` GPUs.

    workers: (node, GPU) or (node, GPU, problem) of each.
    """
    workers = [(*each, "")[:3] for each in workers]
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(launch.comm, "has_nccl", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(
        launch.torch.cuda,
        "get_device_properties",
        lambda index: type("Properties", (), {"uuid": index}),
    )
    monkeypatch.setattr(launch.torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(launch.comm, "local_rank", lambda: local_rank)
    monkeypatch.setattr(launch.comm, "local_size", lambda: 2)
    monkeypatch.setattr(launch.comm, "size", lambda: len(workers))
    monkeypatch.setattr(launch.objects, "allgather", lambda mine, name: workers)
    return launch.own_device(workers[local_rank][2])


def test_gpu_is_the_local_rank_s_or_the_only_one(monkeypatch):
    assert gpus(monkeypatch, 2, [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")], 1).index == 1
    assert gpus(monkeypatch, 1, [("a", "GPU-1"), ("a", "GPU-2")], 1).index == 0


def test_two_workers_on_one_gpu_are_refused(monkeypatch):
    problem = r"2 workers on a machine with 1 GPUs\. Start one worker a GPU"
    with pytest.raises(RunError, match=problem):
        gpus(monkeypatch, 1, [("a", "GPU-1"), ("a", "GPU-1")], 1)


def test_nodes_with_and_without_gpus_are_refused(monkeypatch):
    for visible in (0, 1):
        with pytest.raises(RunError, match="no GPU on b, but GPUs on the other nodes"):
            gpus(monkeypatch, visible, [("a", "GPU-1"), ("b", "")], 0)


@pytest.mark.parametrize("local_rank", [0, 1])
@pytest.mark.parametrize(
    ("workers", "line"),
    [
        ([("a", "", "old driver"), ("a", "", "old driver")], "old driver"),
        ([("a", "GPU-1"), ("b", "", "old driver")], "old driver (on b)"),
        ([("b", "", "old"), ("a", "", "old"), ("c", "", "none")], "old (on a, b)"),
        (
            [(f"n{number}", "", "old") for number in range(9)],
            "old (on n0, n1, n2, n3, n4, n5, n6, n7, ...)",
        ),
    ],
)
def test_unusable_gpu_ends_all_workers(monkeypatch, workers, line, local_rank):
    with pytest.raises(RunError) as caught:
        gpus(monkeypatch, 1, workers, local_rank)
    assert (str(caught.value), caught.value.code) == (line, 2)


def test_problem_of_a_gpu_precedes_differences_of_cpus(monkeypatch, horovod):
    """CPU kernels do not matter to a run that will use GPUs."""
    horovod(2)
    for name, value in {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    compared = []
    monkeypatch.setattr(launch.same_start, "check", lambda *_, on_cpu: compared.append(on_cpu))
    monkeypatch.setattr(launch.gpus, "problem", lambda rank, workers, nccl: f"{rank} of {workers}")
    with pytest.raises(RunError, match="^0 of 2$"):
        launch.start({})
    assert compared == [False]


def test_workers_without_gpus_use_the_cpu(monkeypatch):
    assert gpus(monkeypatch, 0, [("a", ""), ("a", "")], 1).type == "cpu"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_start_sets_variables_and_keeps_the_user_s(monkeypatch, horovod, on_gpu):
    horovod(1)
    monkeypatch.setattr(launch.gpus, "available", lambda: on_gpu)
    monkeypatch.setattr(launch.gpus, "problem", lambda *_: "")
    monkeypatch.setattr(launch.nccl, "keep_log", lambda: None)
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "5")
    assert launch.start({}).type == "cpu"
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "0"  # for the same bytes
    assert os.environ["HOROVOD_CYCLE_TIME"] == "50"
    assert os.environ.get("HOROVOD_ENABLE_ASYNC_COMPLETION") == ("1" if on_gpu else None)
    assert os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] == "5"
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "7")
    launch.start({})
    assert os.environ["HOROVOD_CYCLE_TIME"] == "7"
