"""Horovod's ranks, addresses and variables, computed from srun's."""

import os
import socket
import subprocess

import pytest

from job.errors import RunError
from job.cluster import slurm
from job.errors import StartError
from job.cluster.rendezvous import find
from job.cluster.slurm import StepTask, counts, hostnames, interface_of, seconds


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("a,b[1],c", ["a", "b1", "c"]),
        ("r[1-2]n[3-4]x,z", ["r1n3x", "r1n4x", "r2n3x", "r2n4x", "z"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_hostnames_expands_a_list(text, names):
    assert hostnames(text) == names


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("4", [4]), ("2(x3)", [2, 2, 2]), ("2,1", [2, 1]), ("8(x2),3,1(x2)", [8, 8, 3, 1, 1])],
)
def test_counts_tasks_per_node(text, tasks):
    assert counts(text) == tasks


@pytest.mark.parametrize("tasks", [[1], [4], [2, 2], [2, 1], [1, 2], [3, 1, 2], [1, 1, 1]])
def test_horovod_numbers_equal_horovodrun_s(tasks):
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    nodes = [f"node{number}" for number in range(len(tasks))]
    expected = get_host_assignments(
        parse_hosts(",".join(f"{n}:{t}" for n, t in zip(nodes, tasks, strict=True))), sum(tasks)
    )
    for slot in expected:
        node = nodes.index(slot.hostname)
        numbers = StepTask(slot.rank, sum(tasks), slot.local_rank, node, nodes, tasks).horovod()
        assert numbers == {
            "RANK": slot.rank,
            "SIZE": slot.size,
            "LOCAL_RANK": slot.local_rank,
            "LOCAL_SIZE": slot.local_size,
            "CROSS_RANK": slot.cross_rank,
            "CROSS_SIZE": slot.cross_size,
        }


@pytest.fixture
def step(monkeypatch):
    """A function that sets a task's variables: two nodes, two tasks on each."""

    def of(rank, **others):
        values = dict(
            PROCID=rank, STEP_NUM_TASKS=4, LOCALID=rank % 2, NODEID=rank // 2, JOB_ID=7, STEP_ID=0
        )
        values |= dict(STEP_NODELIST="node[1-2]", STEP_TASKS_PER_NODE="2(x2)") | others
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return of


def test_task_reads_its_variables(step):
    step(3)
    assert StepTask.from_slurm() == StepTask(3, 4, 1, 1, ["node1", "node2"], [2, 2])


def test_rank_0_must_be_on_the_first_node(step):
    step(0, NODEID=1)
    problem = r"rank 0 runs on node2; expected node1\. Start with srun --distribution=block"
    with pytest.raises(StartError, match=problem):
        StepTask.from_slurm()


@pytest.mark.parametrize(
    ("given", "addresses"),
    [
        ("node1=127.0.0.5 other=127.0.0.6 ", {"node1": "127.0.0.5", "localhost": "127.0.0.1"}),
        ("localhost=", {"localhost": "127.0.0.1"}),  # an empty one is resolved
    ],
)
def test_addresses_are_given_or_resolved(monkeypatch, given, addresses):
    monkeypatch.setenv("MGD_NODE_ADDRESSES", given)
    assert slurm.addresses([*addresses]) == addresses


def test_addresses_name_an_unknown_node(monkeypatch):
    monkeypatch.delenv("MGD_NODE_ADDRESSES", raising=False)
    problem = "the address of nowhere.invalid is unknown .*Set MGD_NODE_ADDRESSES"
    with pytest.raises(StartError, match=problem):
        slurm.addresses(["nowhere.invalid"])


def test_interface_has_the_address_or_is_chosen(monkeypatch):
    monkeypatch.delenv("HOROVOD_GLOO_IFACE", raising=False)
    assert interface_of("127.0.0.1") == "lo"
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "nosuch0")
    problem = "HOROVOD_GLOO_IFACE=nosuch0: .* has no such interface .*; expected one of .*lo"
    with pytest.raises(StartError, match=problem):
        interface_of("127.0.0.1")


def test_joined_sets_variables_and_ends_the_rendezvous(step, monkeypatch):
    step(0, STEP_NUM_TASKS=1, STEP_NODELIST="node1", STEP_TASKS_PER_NODE="1")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("HOROVOD_GLOO_IFACE", None)
    with slurm.joined():
        expected = {"RANK": "0", "SIZE": "1", "HOSTNAME": "node1"}
        expected |= {"CONTROLLER": "gloo", "GLOO_IFACE": "lo"}
        assert {name: os.environ[f"HOROVOD_{name}"] for name in expected} == expected
        port = int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
        address, token = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"].split("/")
        assert address == f"127.0.0.1:{port}"
        assert find("127.0.0.1", port, slurm.job_key(StepTask.from_slurm())) == (port, token)
    assert os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_job_key_depends_on_secret_job_and_start(step, monkeypatch):
    def key(secret, **others):
        step(1, **others)
        monkeypatch.setenv("MGD_SECRET", secret)
        return slurm.job_key(StepTask.from_slurm())

    keys = [
        key("a" * 32),
        key("b" * 32),
        key("a" * 32, JOB_ID=8),
        key("a" * 32, STEP_ID=1),
        key("a" * 32, RESTART_COUNT=1),
    ]
    assert len(set(keys)) == 5
    assert key("a" * 32, RESTART_COUNT=0) == keys[0]


def test_missing_secret_is_logged_once(step, monkeypatch, capfd):
    monkeypatch.delenv("MGD_SECRET", raising=False)
    for rank in range(4):
        step(rank)
        slurm.job_key(StepTask.from_slurm())
    step(0, STEP_NUM_TASKS=1, STEP_NODELIST="node1", STEP_TASKS_PER_NODE="1")
    slurm.job_key(StepTask.from_slurm())
    [line] = capfd.readouterr().out.splitlines()
    warning, _, command = line.partition(" Before srun, run: ")
    problem = "other users of the job's nodes can join its rendezvous."
    assert warning == f"no MGD_SECRET: {problem}" and command.startswith("export")
    shell = ["bash", "-c", f"{command}; printenv MGD_SECRET"]
    secret = subprocess.run(shell, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("MGD_SECRET", secret)
    step(0)
    slurm.job_key(StepTask.from_slurm())
    assert capfd.readouterr() == ("", "")


def test_short_secret_is_refused_and_not_printed(step, monkeypatch):
    step(0)
    monkeypatch.setenv("MGD_SECRET", "hunter2")
    problem = "^MGD_SECRET: too short; expected at least 32 characters. Before srun, run: "
    with pytest.raises(RunError, match=problem) as caught:
        slurm.job_key(StepTask.from_slurm())
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", ["ten", "", "0", "-1", "nan", "inf", "10s"])
def test_seconds_must_be_positive_and_finite(monkeypatch, value):
    monkeypatch.setenv("MGD_START_SECONDS", value)
    problem = rf"^MGD_START_SECONDS={value}: expected seconds above 0\. Unset it for 600$"
    with pytest.raises(RunError, match=problem) as caught:
        seconds("MGD_START_SECONDS", 600)
    assert caught.value.code == 2


def test_seconds_have_a_default(monkeypatch):
    monkeypatch.delenv("MGD_START_SECONDS", raising=False)
    assert seconds("MGD_START_SECONDS", 600) == 600
    monkeypatch.setenv("MGD_START_SECONDS", "2.5")
    assert seconds("MGD_START_SECONDS", 600) == 2.5
