"""The rendezvous that rank 0 serves while Horovod starts: Horovod's own small HTTP server, for the job's nodes alone."""

import http.client
import threading
import time
from typing import Any

from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from job.errors import RunError

PORTS = 8  # so many ports are tried from the job's own on
PAUSE = 0.2  # s between two questions
LARGEST = 2**20  # bytes of what is put: Gloo puts about 140 a rank


class StartError(RunError):
    """An error of one task's start, which the others know nothing of: not always rank 0's."""


class Handler(RendezvousHandler):
    """Horovod's handler, without what it inherits and does not need: HEAD would tell of the files in the working folder."""

    def do_HEAD(self) -> None:
        """Refuse."""
        self.send_status_code(501)

    def do_PUT(self) -> None:
        """Keep what is put, unless it is larger than anything that Horovod or this program puts, or of no length."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) <= LARGEST:
            super().do_PUT()
        else:
            self.close_connection = True
            self.send_status_code(413)


class Server(RendezvousHTTPServer):
    """Horovod's rendezvous, on one address of rank 0's machine, for requests from the job's nodes alone."""

    request_queue_size = 1024  # hundreds of ranks ask at once
    daemon_threads = True

    def __init__(self, address: str, port: int, allowed: set[str], job: str):
        super().__init__((address, port), Handler, verbose=False)
        self.allowed = allowed
        self.refused: set[str] = set()
        self.cache["job"] = {"id": job.encode()}

    def verify_request(self, request: Any, client_address: tuple[str, int]) -> bool:
        """Whether the request comes from one of the job's nodes. Others are named once, and get no answer."""
        client = client_address[0]
        if client not in self.allowed and client not in self.refused:
            self.refused.add(client)
            print(
                f"refused {client} at the rendezvous, which answers {', '.join(sorted(self.allowed))}: if it is a node of "
                "this job, give its address in MGD_NODE_ADDRESSES",
                flush=True,
            )
        return client in self.allowed

    def handle_error(self, request: Any, client_address: tuple[str, int]) -> None:
        """Pass over a client that goes away in the middle of a request: it asks again."""

    def started(self) -> dict[int, str]:
        """The ranks that have come, each with `NODE INTERFACE ADDRESS`."""
        with self.cache_lock:
            return {int(rank): value.decode() for rank, value in self.cache.get("started", {}).items()}


def serve(address: str, first_port: int, allowed: set[str], job: str) -> Server:
    """Return the running rendezvous, at the first port from `first_port` on that is free. StartError: none is."""
    for port in range(first_port, first_port + PORTS):
        try:
            server = Server(address, port, allowed, job)
        except OSError as error:
            reason = error.strerror
            continue
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server
    raise StartError(f"no rendezvous at {address}, ports {first_port} to {first_port + PORTS - 1} ({reason})", code=1)


def ask(address: str, port: int, path: str, put: bytes | None = None) -> bytes | None:
    """Return what the rendezvous has at `path`, or put it there; None where there is no answer or no such thing."""
    connection = http.client.HTTPConnection(address, port, timeout=3)
    try:
        connection.request("GET" if put is None else "PUT", path, body=put)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def wait_for_all(server: Server, size: int, patience: float) -> None:
    """Wait until every rank below `size` has come to the rendezvous. StartError: some have not in `patience` seconds."""
    begun, said = time.monotonic(), 0.0
    while missing := sorted(set(range(1, size)) - set(server.started())):
        waited = time.monotonic() - begun
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}{', ...' * (len(missing) > 8)} of {size}"
        if waited > patience:
            raise StartError(
                f"{names} did not come to the rendezvous in {patience:.0f} s; their own lines may say why, "
                "and MGD_START_SECONDS allows more",
                code=1,
            )
        if waited // 15 > said:
            said = waited // 15
            print(f"waiting for {names} to start", flush=True)
        time.sleep(PAUSE / 4)


def check_interfaces(known: dict[str, str], chosen: list[str]) -> None:
    """StartError: of the ranks, each `NODE INTERFACE ADDRESS`, some of two nodes have one address: neither finds the other.

    So it is with `lo`, and with the bridges that containers bring. `known` has the nodes' own addresses: on one
    machine that stands for several nodes they are the same, and may be.
    """
    nodes: dict[str, str] = {}
    for node, interface, address in map(str.split, chosen):
        other = nodes.setdefault(address, node)
        if known[node] != known[other]:
            raise StartError(
                f"interface {interface} has the address {address} on {other} and on {node}, which cannot reach each other by it: "
                "choose another by HOROVOD_GLOO_IFACE"
            )


def join(address: str, first_port: int, rank: int, chosen: str, job: str, patience: float) -> int:
    """Tell the rendezvous that this rank has come, with its `NODE INTERFACE ADDRESS`; wait until all have; return its port.

    StartError: not in `patience` s.
    """
    deadline, port = time.monotonic() + patience, None
    while time.monotonic() < deadline:
        if port is None:
            ports = range(first_port, first_port + PORTS)
            port = next((number for number in ports if ask(address, number, "/job/id") == job.encode()), None)
            if port and ask(address, port, f"/started/{rank}", put=chosen.encode()) is None:
                port = None
        elif ask(address, port, "/go/all"):
            return port
        time.sleep(PAUSE)
    if port:
        raise StartError(f"not all ranks came to the rendezvous at {address}:{port} in {patience:.0f} s", code=1)
    raise StartError(
        f"no answer from rank 0's rendezvous at {address}, ports {first_port} to {first_port + PORTS - 1}, in {patience:.0f} s: "
        "rank 0 has not started, or a firewall or a wrong address (MGD_NODE_ADDRESSES) is between",
        code=1,
    )
