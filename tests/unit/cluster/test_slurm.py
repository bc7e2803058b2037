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
def test_a_host_list_stands_for_its_names_in_order(text, names):
    assert hostnames(text) == names


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("4", [4]), ("2(x3)", [2, 2, 2]), ("2,1", [2, 1]), ("8(x2),3,1(x2)", [8, 8, 3, 1, 1])],
)
def test_tasks_per_node_are_counted_node_by_node(text, tasks):
    assert counts(text) == tasks


@pytest.mark.parametrize("tasks", [[1], [4], [2, 2], [2, 1], [1, 2], [3, 1, 2], [1, 1, 1]])
def test_horovod_s_numbers_are_those_that_its_own_launcher_gives(tasks):
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
    """A function that sets srun's variables for a task of a step of two nodes with two tasks each."""

    def of(rank, **others):
        values = dict(
            PROCID=rank, STEP_NUM_TASKS=4, LOCALID=rank % 2, NODEID=rank // 2, JOB_ID=7, STEP_ID=0
        )
        values |= dict(STEP_NODELIST="node[1-2]", STEP_TASKS_PER_NODE="2(x2)") | others
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return of


def test_a_task_finds_its_place(step):
    step(3)
    assert StepTask.from_slurm() == StepTask(3, 4, 1, 1, ["node1", "node2"], [2, 2])


def test_rank_0_on_another_node_than_the_first_is_refused(step):
    step(0, NODEID=1)
    with pytest.raises(
        StartError,
        match=r"rank 0 runs on node2; expected node1\. Start with srun --distribution=block",
    ):
        StepTask.from_slurm()


def test_addresses_are_given_or_resolved(monkeypatch):
    monkeypatch.setenv("MGD_NODE_ADDRESSES", "node1=127.0.0.5 other=127.0.0.6 ")
    assert slurm.addresses(["node1", "localhost"]) == {
        "node1": "127.0.0.5",
        "localhost": "127.0.0.1",
    }


def test_an_unknown_address_is_said_with_what_to_do(monkeypatch):
    monkeypatch.delenv("MGD_NODE_ADDRESSES", raising=False)
    with pytest.raises(
        StartError,
        match="the address of nowhere.invalid is unknown .*Set MGD_NODE_ADDRESSES",
    ):
        slurm.addresses(["nowhere.invalid"])


def test_the_interface_is_that_of_the_address_or_the_one_that_is_chosen(monkeypatch):
    monkeypatch.delenv("HOROVOD_GLOO_IFACE", raising=False)
    assert interface_of("127.0.0.1") == "lo"
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "nosuch0")
    with pytest.raises(
        StartError,
        match="HOROVOD_GLOO_IFACE=nosuch0: .* has no such interface .*; expected one of .*lo",
    ):
        interface_of("127.0.0.1")


def test_an_address_that_is_given_as_nothing_is_resolved(monkeypatch):
    monkeypatch.setenv("MGD_NODE_ADDRESSES", "localhost=")
    assert slurm.addresses(["localhost"]) == {"localhost": "127.0.0.1"}


def test_horovod_s_variables_are_set_and_the_rendezvous_goes_when_all_are_up(step, monkeypatch):
    step(0, STEP_NUM_TASKS=1, STEP_NODELIST="node1", STEP_TASKS_PER_NODE="1")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("HOROVOD_GLOO_IFACE", None)
    with slurm.joined():
        assert {
            name: os.environ[f"HOROVOD_{name}"]
            for name in ("RANK", "SIZE", "HOSTNAME", "CONTROLLER", "GLOO_IFACE")
        } == {
            "RANK": "0",
            "SIZE": "1",
            "HOSTNAME": "node1",
            "CONTROLLER": "gloo",
            "GLOO_IFACE": "lo",
        }
        port = int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
        at, token = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"].split("/")
        assert at == f"127.0.0.1:{port}"
        assert find("127.0.0.1", port, slurm.job_key(StepTask.from_slurm())) == (port, token)
    assert os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_the_key_is_another_for_each_secret_job_and_try(step, monkeypatch):
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


def test_a_step_without_a_secret_is_told_once(step, monkeypatch, capfd):
    monkeypatch.delenv("MGD_SECRET", raising=False)
    for rank in range(4):
        step(rank)
        slurm.job_key(StepTask.from_slurm())
    step(0, STEP_NUM_TASKS=1, STEP_NODELIST="node1", STEP_TASKS_PER_NODE="1")
    slurm.job_key(StepTask.from_slurm())
    [line] = capfd.readouterr().out.splitlines()
    assert line.startswith(
        "no MGD_SECRET: other users of the job's nodes can join its rendezvous. Before srun, run: export"
    )
    command = line.partition("run: ")[2]
    secret = subprocess.run(
        ["bash", "-c", f"{command}; printenv MGD_SECRET"], capture_output=True, text=True
    ).stdout.strip()
    monkeypatch.setenv("MGD_SECRET", secret)
    step(0)
    slurm.job_key(StepTask.from_slurm())
    assert capfd.readouterr() == ("", "")


def test_a_short_secret_is_refused_without_its_value(step, monkeypatch):
    step(0)
    monkeypatch.setenv("MGD_SECRET", "hunter2")
    with pytest.raises(
        RunError,
        match="^MGD_SECRET: too short; expected at least 32 characters. Before srun, run: ",
    ) as caught:
        slurm.job_key(StepTask.from_slurm())
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", ["ten", "", "0", "-1", "nan", "inf", "10s"])
def test_seconds_that_are_none_are_refused(monkeypatch, value):
    monkeypatch.setenv("MGD_START_SECONDS", value)
    with pytest.raises(
        RunError,
        match=rf"^MGD_START_SECONDS={value}: expected seconds above 0\. Unset it for 600$",
    ) as caught:
        seconds("MGD_START_SECONDS", 600)
    assert caught.value.code == 2


def test_seconds_are_those_of_the_environment_or_the_usual_ones(monkeypatch):
    monkeypatch.delenv("MGD_START_SECONDS", raising=False)
    assert seconds("MGD_START_SECONDS", 600) == 600
    monkeypatch.setenv("MGD_START_SECONDS", "2.5")
    assert seconds("MGD_START_SECONDS", 600) == 2.5
