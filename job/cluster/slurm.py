"""Horovod under plain srun, without ssh or MPI: set its variables, and serve the rendezvous.

Horovod's own launcher gives the workers their ranks, and the address of a small HTTP server at
which they find each other. Here each task reads its ranks from SLURM's variables, and rank 0 runs
that server until all ranks have started.
"""

import contextlib
import math
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from job.cluster import guard
from job.errors import RunError, StartError

SECRET = 32  # characters of MGD_SECRET, at least
MAKE_SECRET = 'run: export MGD_SECRET="$(head -c 32 /dev/urandom | base64)"'


def seconds(variable: str, usual: float) -> float:
    """Return the s in an environment variable, or `usual`. RunError: not a number above 0."""
    value = os.environ.get(variable, usual)
    try:
        if 0 < float(value) < math.inf:
            return float(value)
    except ValueError:
        pass
    raise RunError(f"{variable}={value}: expected seconds above 0. Unset it for {usual:g}")


@dataclass
class StepTask:
    """A task of a job step: its ranks, and the step's nodes.

    node: index in `nodes`. nodes: names, in the step's order. tasks: number of tasks of each node.
    """

    rank: int
    size: int
    local_rank: int
    node: int
    nodes: list[str]
    tasks: list[int]

    @classmethod
    def from_slurm(cls) -> "StepTask":
        """Return this task, from srun's variables. StartError: rank 0 is not on the first node."""
        number = {
            name: int(os.environ[f"SLURM_{name}"])
            for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID")
        }
        nodes = hostnames(os.environ["SLURM_STEP_NODELIST"])
        tasks = counts(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        task = cls(
            number["PROCID"],
            number["STEP_NUM_TASKS"],
            number["LOCALID"],
            number["NODEID"],
            nodes,
            tasks,
        )
        if task.rank == 0 and task.node != 0:
            raise StartError(
                f"rank 0 runs on {nodes[task.node]}; expected {nodes[0]}. "
                "Start with srun --distribution=block"
            )
        return task

    def horovod(self) -> dict[str, int]:
        """Return Horovod's numbers for this task, by the endings of their variables.

        Workers with the same local rank on different nodes are Horovod's `cross` group.
        """
        cross = [node for node, tasks in enumerate(self.tasks) if tasks > self.local_rank]
        return {
            "RANK": self.rank,
            "SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_SIZE": self.tasks[self.node],
            "CROSS_RANK": cross.index(self.node),
            "CROSS_SIZE": len(cross),
        }


def ours() -> bool:
    """Return whether `joined` has set Horovod's variables, and not another launcher."""
    return os.environ.get("MGD_LAUNCHER") == "srun"


def hostnames(text: str) -> list[str]:
    """Return the names in a SLURM host list such as `gpu[01-03,7],login`."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            ends = [plain] if plain else numbers(ranges)
            expanded = [name + end for name in expanded for end in ends]
        names += expanded
    return names


def numbers(ranges: str) -> list[str]:
    """Return the numbers in the brackets of a host list, such as `08-10,12`, with their zeros."""
    expanded = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        expanded += [
            str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)
        ]
    return expanded


def counts(text: str) -> list[int]:
    """Return the number of tasks of each node: [2, 2, 2, 1] for SLURM's `2(x3),1`."""
    return [
        int(tasks)
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]


def addresses(nodes: list[str]) -> dict[str, str]:
    """Return the IPv4 address of each node.

    It is from MGD_NODE_ADDRESSES (`node1=10.0.0.1 node2=10.0.0.2`), or else by its name.
    StartError: a name does not resolve.
    """
    given = dict(
        pair.partition("=")[::2] for pair in os.environ.get("MGD_NODE_ADDRESSES", "").split()
    )
    resolved = {}
    for node in nodes:
        try:
            resolved[node] = socket.gethostbyname(given.get(node) or node)
        except OSError as error:
            raise StartError(
                f"the address of {node} is unknown ({error.strerror or error}). "
                "Set MGD_NODE_ADDRESSES, as in 'node1=10.0.0.1 node2=10.0.0.2'"
            ) from None
    return resolved


def address_towards(other: str) -> str:
    """Return this machine's address on its route to another address. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return probe.getsockname()[0]


def interfaces() -> dict[str, str]:
    """Return this machine's IPv4 addresses, each with the name of its network interface."""
    all_interfaces = psutil.net_if_addrs().items()
    return {
        item.address: name
        for name, items in all_interfaces
        for item in items
        if item.family == socket.AF_INET
    }


def interface_of(address: str) -> str:
    """Return HOROVOD_GLOO_IFACE, or else the name of the interface with an IPv4 address.

    StartError: this machine has no interface HOROVOD_GLOO_IFACE.
    """
    names = interfaces()
    chosen = os.environ.get("HOROVOD_GLOO_IFACE")
    if chosen and chosen not in names.values():
        raise StartError(
            f"HOROVOD_GLOO_IFACE={chosen}: {socket.gethostname()} has no such interface with an "
            f"IPv4 address; expected one of {', '.join(sorted(set(names.values())))}"
        )
    return chosen or names.get(address, "lo")  # lo also has addresses such as 127.0.0.2


def address_of(interface: str) -> str:
    """Return this machine's first IPv4 address on an interface."""
    return next(
        (address for address, name in interfaces().items() if name == interface), "127.0.0.1"
    )


def job_key(task: StepTask) -> bytes:
    """Return the key of the rendezvous for this try of the job, the same for all ranks.

    RunError: MGD_SECRET, from which it is computed, is too short.
    """
    secret = os.fsencode(os.environ.get("MGD_SECRET", ""))
    if 0 < len(secret) < SECRET:
        raise RunError(
            f"MGD_SECRET: too short; expected at least {SECRET} characters. "
            f"Before srun, {MAKE_SECRET}"
        )
    if not secret and task.rank == 0 and task.size > 1:
        print(
            "no MGD_SECRET: other users of the job's nodes can join its rendezvous. "
            f"Before srun, {MAKE_SECRET}",
            flush=True,
        )
    job = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    return guard.prove(secret, *job).encode()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the ranks at the rendezvous, and set Horovod's variables, while Horovod starts.

    Rank 0 runs the server, which stops at the end of the context. So no rank may leave the context
    before Horovod has started on all of them.
    StartError: not all ranks have joined, or some cannot reach each other.
    """
    from job.cluster import rendezvous  # needs Horovod, which a single task does not need

    task = StepTask.from_slurm()
    known = addresses(task.nodes) if len(task.nodes) > 1 else {task.nodes[0]: "127.0.0.1"}
    others = [known[node] for node in task.nodes if node != task.nodes[task.node]]
    address = known[task.nodes[0]]
    mine = address_towards(address if task.node else (others or [address])[0])
    if task.node == 0 and others and address.startswith("127.") and not mine.startswith("127."):
        # /etc/hosts often maps a machine's own name to 127.0.1.1, which others cannot reach.
        address = mine
    key = job_key(task)
    first_port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) * rendezvous.PORTS % 10000
    interface = interface_of(mine)
    chosen = f"{task.nodes[task.node]} {interface} {address_of(interface)}"
    patience = seconds("MGD_START_SECONDS", 600)

    server = None
    try:
        if task.rank == 0:
            server = rendezvous.serve(
                address, first_port, {*known.values(), mine, address}, task.size, key
            )
            port, token = server.server_address[1], server.token
            rendezvous.wait_for_all(server, task.size, patience)
            rendezvous.check_interfaces(known, [chosen, *server.started().values()])
            server.go()
        else:
            port, token = rendezvous.join(address, first_port, task.rank, chosen, key, patience)
        os.environ |= {f"HOROVOD_{name}": str(value) for name, value in task.horovod().items()}
        os.environ |= {
            "MGD_LAUNCHER": "srun",
            "HOROVOD_HOSTNAME": task.nodes[task.node],
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": interface,
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": rendezvous.horovod_address(address, port, token),
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        }
        if others:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        yield
        os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] = address
    finally:
        if server:
            server.shutdown()
            server.server_close()
