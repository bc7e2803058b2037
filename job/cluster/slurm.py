"""Horovod under plain srun, without ssh and MPI: from SLURM's variables to Horovod's, and a rendezvous that rank 0 serves.

Horovod's own launcher gives its workers their numbers and the address of a small HTTP server where they find each
other. Here each task takes its numbers from SLURM, and rank 0 serves that server itself until all are up.
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

SECRET = 32  # characters, at least
MAKE_SECRET = 'run: export MGD_SECRET="$(head -c 32 /dev/urandom | base64)"'


def seconds(variable: str, usual: float) -> float:
    """The seconds that an environment variable allows. RunError: they are no number above 0."""
    value = os.environ.get(variable, usual)
    try:
        if 0 < float(value) < math.inf:
            return float(value)
    except ValueError:
        pass
    raise RunError(f"{variable}={value}: expected seconds, above 0; leave it out for {usual:g}")


@dataclass
class Place:
    """Where a task of a job step stands. `nodes` are in the step's order, `tasks` says how many each has."""

    rank: int
    size: int
    local_rank: int
    node: int
    nodes: list[str]
    tasks: list[int]

    @classmethod
    def from_slurm(cls) -> "Place":
        """This task's place, from the variables that srun gives it. StartError: rank 0 is not on the first node."""
        number = {
            name: int(os.environ[f"SLURM_{name}"])
            for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID")
        }
        nodes, tasks = (
            hostnames(os.environ["SLURM_STEP_NODELIST"]),
            counts(os.environ["SLURM_STEP_TASKS_PER_NODE"]),
        )
        place = cls(
            number["PROCID"],
            number["STEP_NUM_TASKS"],
            number["LOCALID"],
            number["NODEID"],
            nodes,
            tasks,
        )
        if place.rank == 0 and place.node != 0:
            raise StartError(
                f"rank 0 runs on {nodes[place.node]}, expected on {nodes[0]}: start with srun --distribution=block"
            )
        return place

    def horovod(self) -> dict[str, int]:
        """The numbers that Horovod asks for; workers of one local rank on different nodes are its `cross` group."""
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
    """Whether Horovod's variables are those that `joined` has set here, and not another launcher's."""
    return os.environ.get("MGD_LAUNCHER") == "srun"


def hostnames(text: str) -> list[str]:
    """The names that a SLURM host list such as `gpu[01-03,7],login` stands for."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        found = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            found = [
                name + end for name in found for end in ([plain] if plain else numbers(ranges))
            ]
        names += found
    return names


def numbers(ranges: str) -> list[str]:
    """The numbers that the inside of a host list's brackets stands for, each as wide as it is written: `08-10,12`."""
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [
            str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)
        ]
    return found


def counts(text: str) -> list[int]:
    """The tasks of each node that SLURM writes as `2(x3),1`: [2, 2, 2, 1]."""
    return [
        int(tasks)
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]


def addresses(nodes: list[str]) -> dict[str, str]:
    """The IPv4 address of each node: as MGD_NODE_ADDRESSES has it (`node1=10.0.0.1 node2=10.0.0.2`), or as its name resolves.

    StartError: it does not.
    """
    given = dict(
        pair.partition("=")[::2] for pair in os.environ.get("MGD_NODE_ADDRESSES", "").split()
    )
    found = {}
    for node in nodes:
        try:
            found[node] = socket.gethostbyname(given.get(node) or node)
        except OSError as error:
            raise StartError(
                f"the address of {node} is unknown ({error.strerror or error}): "
                "give it in MGD_NODE_ADDRESSES, as in 'node1=10.0.0.1 node2=10.0.0.2'"
            ) from None
    return found


def address_towards(other: str) -> str:
    """The address of this machine from which it reaches the address `other`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return probe.getsockname()[0]


def interfaces() -> dict[str, str]:
    """This machine's IPv4 addresses, each with the name of its network interface."""
    found = psutil.net_if_addrs().items()
    return {
        item.address: name
        for name, items in found
        for item in items
        if item.family == socket.AF_INET
    }


def interface_of(address: str) -> str:
    """The name of this machine's network interface with an IPv4 address; HOROVOD_GLOO_IFACE, if set, in its place.

    StartError: there is no interface of that name.
    """
    found = interfaces()
    chosen = os.environ.get("HOROVOD_GLOO_IFACE")
    if chosen and chosen not in found.values():
        raise StartError(
            f"HOROVOD_GLOO_IFACE={chosen}: {socket.gethostname()} has no such interface with an IPv4 address; "
            f"expected one of {', '.join(sorted(set(found.values())))}"
        )
    return chosen or found.get(address, "lo")  # 127.0.0.2, say, is lo's too


def address_of(interface: str) -> str:
    """This machine's first IPv4 address on an interface."""
    return next(
        (address for address, name in interfaces().items() if name == interface), "127.0.0.1"
    )


def job_key(place: Place) -> bytes:
    """Return the key of this try's rendezvous: from MGD_SECRET, the same for all ranks. RunError: it is too short."""
    secret = os.fsencode(os.environ.get("MGD_SECRET", ""))
    if 0 < len(secret) < SECRET:
        raise RunError(
            f"MGD_SECRET: too short; expected at least {SECRET} characters. Before srun, {MAKE_SECRET}"
        )
    if not secret and place.rank == 0 and place.size > 1:
        print(
            f"no MGD_SECRET: other users of the job's nodes can join its rendezvous. Before srun, {MAKE_SECRET}",
            flush=True,
        )
    job = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    return guard.prove(secret, *job).encode()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Set Horovod's variables and serve, or find, its rendezvous, while Horovod starts; its address is in the variables.

    On leaving, which all ranks may do only when Horovod is up on all of them, the server is gone.
    StartError: not all ranks have come, or some cannot reach each other.
    """
    from job.cluster import rendezvous  # it needs Horovod, and one task does not

    place = Place.from_slurm()
    known = addresses(place.nodes) if len(place.nodes) > 1 else {place.nodes[0]: "127.0.0.1"}
    others = [known[node] for node in place.nodes if node != place.nodes[place.node]]
    address = known[place.nodes[0]]
    mine = address_towards(address if place.node else (others or [address])[0])
    if place.node == 0 and others and address.startswith("127.") and not mine.startswith("127."):
        address = mine  # /etc/hosts often has a machine's own name at 127.0.1.1, where no other machine finds it
    key = job_key(place)
    first_port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) * rendezvous.PORTS % 10000
    interface = interface_of(mine)
    chosen = f"{place.nodes[place.node]} {interface} {address_of(interface)}"
    patience = seconds("MGD_START_SECONDS", 600)

    server = None
    try:
        if place.rank == 0:
            server = rendezvous.serve(
                address, first_port, {*known.values(), mine, address}, place.size, key
            )
            port, token = server.server_address[1], server.token
            rendezvous.wait_for_all(server, place.size, patience)
            rendezvous.check_interfaces(known, [chosen, *server.started().values()])
            server.go()
        else:
            port, token = rendezvous.join(address, first_port, place.rank, chosen, key, patience)
        os.environ |= {f"HOROVOD_{name}": str(value) for name, value in place.horovod().items()}
        os.environ |= {
            "MGD_LAUNCHER": "srun",
            "HOROVOD_HOSTNAME": place.nodes[place.node],
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
