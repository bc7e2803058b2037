"""Rank 0's rendezvous for Horovod's start: its own HTTP server, for the job's ranks only.

A rank tries PORTS ports, because other programs may use some of them:

    rank   GET /hello/NONCE
    rank 0 OWN_NONCE HMAC(key, "rendezvous", address, port, NONCE, OWN_NONCE)  proves rank 0's port
    rank   PUT /TOKEN/started/RANK with TOKEN = HMAC(key, "rank", OWN_NONCE)     proves a rank

Every request except the first has the token. Horovod's own client cannot compute an HMAC, but it
sends the token as the first part of its path (`horovod_address`).
"""

import io
import re
import socket
import threading
import time
from http import HTTPStatus
from typing import Any

from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from job.cluster import guard
from job.errors import StartError

PORTS = 8  # ports to try, from the job's own
PAUSE = 0.2  # s between two requests
ANSWER = 3.0  # s for an answer: seven of eight ports may be other programs' that never answer
REQUEST = 10.0  # s for a request, from start to end
HEAD = 4096  # bytes of the head of a request or an answer
# For each rank, Gloo puts a host name and, twice, 136 bytes for each other rank.
PER_PUT = 1024  # bytes of a key and of the data that does not depend on the number of ranks
PER_PAIR = 256  # bytes that a rank puts for another rank

HELLO = re.compile(r"/hello/([0-9a-f]{32})")
# Gloo adds the port.
PATH = re.compile(r"/([0-9a-f]{64})(?::\d+)?(/[\w.-]{1,255}/[\w.-]{1,64})", re.ASCII)
STARTED = re.compile(rb"[!-~]{1,255} [!-~]{1,64} [\d.]{7,15}")
LENGTH = re.compile(r"\d{1,9}", re.ASCII)


class Handler(RendezvousHandler):
    """Horovod's handler for requests with the token, with limits on their size and time."""

    server: "Server"
    rfile: io.BufferedReader
    path: str

    def setup(self) -> None:
        """Limit the size of the client's request, and its time."""
        super().setup()
        self.rfile.close()
        self.rfile = guard.bounded(self.connection, HEAD + self.server.largest, REQUEST)

    def parse_request(self) -> bool:
        """Read the head of the request. Answer all except GET, PUT and DELETE with the token.

        Return whether the request is one of these three, so that it needs an answer.
        """
        if not super().parse_request():
            return False
        hello, path = HELLO.fullmatch(self.path), PATH.fullmatch(self.path)
        if self.command == "GET" and hello:
            self.send_text(self.server.greeting(hello[1]))
        elif self.command not in ("GET", "PUT", "DELETE"):
            self.send_status_code(HTTPStatus.NOT_IMPLEMENTED)
        elif not path:
            self.send_status_code(HTTPStatus.BAD_REQUEST)
        elif not self.server.admits(path[1]):
            self.send_status_code(HTTPStatus.FORBIDDEN)
        else:
            self.path = path[2]
            return True
        return False

    def do_PUT(self) -> None:
        """Store the value of a key if the request is complete and the store has room."""
        length = self.headers.get("Content-Length", "")
        if not LENGTH.fullmatch(length) or int(length) > self.server.largest:
            self.send_status_code(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        value = self.rfile.read(int(length))
        if len(value) == int(length):
            _, scope, key = self.path.split("/")
            self.send_status_code(self.server.store(scope, key, value))

    def send_text(self, text: str) -> None:
        """Answer with a text."""
        self.send_response(HTTPStatus.OK)
        self.end_headers()
        self.wfile.write(text.encode())


class Server(guard.BoundedServer, RendezvousHTTPServer):
    """Horovod's rendezvous for `size` ranks that prove the key, at one address of rank 0's node."""

    def __init__(self, address: str, port: int, allowed: set[str], size: int, key: bytes):
        super().__init__((address, port), Handler, verbose=False)
        self.at, self.allowed, self.size, self.key = (address, port), allowed, size, key
        self.most = 64 + 2 * size
        self.nonce = guard.nonce()
        self.token = guard.prove(key, "rank", self.nonce)
        self.largest = PER_PUT + PER_PAIR * size  # bytes of a value
        # The bytes that keys and values can still use.
        self.room = size * (16 * PER_PUT + 2 * PER_PAIR * size)
        self.refused: set[str] = set()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the client is on a node of the job. Print the first few others, once."""
        client = client_address[0]
        if client not in self.allowed and client not in self.refused and len(self.refused) < 8:
            self.refused.add(client)
            print(
                f"refused {client} at the rendezvous, which answers "
                f"{', '.join(sorted(self.allowed))}: if it is a node of this job, set its address "
                "in MGD_NODE_ADDRESSES",
                flush=True,
            )
        return super().verify_request(request, client_address)

    def greeting(self, nonce: str) -> str:
        """Return the server's nonce, and the proof that this address and port are rank 0's."""
        return f"{self.nonce} {guard.prove(self.key, 'rendezvous', *self.at, nonce, self.nonce)}"

    def admits(self, token: str) -> bool:
        """Return whether a token proves that the client has the key."""
        return guard.proves(token, self.key, "rank", self.nonce)

    def store(self, scope: str, key: str, value: bytes) -> HTTPStatus:
        """Store a value if it is well-formed and fits, and return the status for the client."""
        started = key.isdecimal() and int(key) < self.size and STARTED.fullmatch(value)
        if scope == "go" or (scope == "started" and not started):
            return HTTPStatus.BAD_REQUEST
        with self.cache_lock:
            cost = PER_PUT + len(value)
            if cost > self.room:
                return HTTPStatus.INSUFFICIENT_STORAGE
            self.room -= cost
            self.cache.setdefault(scope, {})[key] = value
        return HTTPStatus.OK

    def started(self) -> dict[int, str]:
        """Return the ranks that have joined, each with `NODE INTERFACE ADDRESS`."""
        with self.cache_lock:
            return {
                int(rank): value.decode() for rank, value in self.cache.get("started", {}).items()
            }

    def go(self) -> None:
        """Allow all ranks to start Horovod."""
        with self.cache_lock:
            self.cache["go"] = {"all": b"1"}


def serve(address: str, first_port: int, allowed: set[str], size: int, key: bytes) -> Server:
    """Start the rendezvous at the first free port from `first_port`, and return its server.

    StartError: no port is free.
    """
    for port in range(first_port, first_port + PORTS):
        try:
            server = Server(address, port, allowed, size, key)
        except OSError as error:
            reason = error.strerror
            continue
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return server
    raise StartError(
        f"no rendezvous at {address}, ports {first_port} to {first_port + PORTS - 1} ({reason})",
        code=1,
    )


def horovod_address(address: str, port: int, token: str) -> str:
    """Return an address for Horovod's client that puts the token into all its URLs.

    Horovod appends `:PORT/SCOPE/KEY` to it (HTTPStore in horovod/common/gloo/http_store.h).
    """
    return f"{address}:{port}/{token}"


def request(address: str, port: int, path: str, put: bytes | None = None) -> bytes | None:
    """Get a path of a server, or put data there.

    Return the content of an answer of status 200, else None.
    """
    method, body = ("GET", b"") if put is None else ("PUT", put)
    try:
        with socket.create_connection((address, port), timeout=ANSWER) as connection:
            connection.sendall(
                f"{method} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            answer = guard.bounded(connection, HEAD, ANSWER).read()
    except OSError:
        return None
    head, _, content = answer.partition(b"\r\n\r\n")
    return content if b" 200 " in head.partition(b"\r\n")[0] else None


def wait_for_all(server: Server, size: int, patience: float) -> None:
    """Wait until every rank below `size` has joined. StartError: not within `patience` s."""
    start, printed = time.monotonic(), 0.0
    while missing := sorted(set(range(1, size)) - set(server.started())):
        waited = time.monotonic() - start
        listed = f"{', '.join(map(str, missing[:8]))}{', ...' * (len(missing) > 8)}"
        names = f"rank{'s' * (len(missing) > 1)} {listed} of {size}"
        if waited > patience:
            raise StartError(
                f"{names} did not join the rendezvous within {patience:.0f} s. See their own log "
                "lines, or set a longer MGD_START_SECONDS",
                code=1,
            )
        if waited // 15 > printed:
            printed = waited // 15
            print(f"waiting for {names} to start", flush=True)
        time.sleep(PAUSE / 4)


def check_interfaces(known: dict[str, str], chosen: list[str]) -> None:
    """Check that ranks on different nodes have different addresses, so they reach each other.

    The addresses of `lo` and of containers' bridges are the same on all nodes.

    known: the address of each node. Nodes with the same one, which are one machine, may have ranks
    with the same address. chosen: `NODE INTERFACE ADDRESS` of each rank.
    StartError: two other nodes have ranks with the same address.
    """
    nodes: dict[str, str] = {}
    for node, interface, address in map(str.split, chosen):
        other = nodes.setdefault(address, node)
        if known.get(node) != known.get(other):
            raise StartError(
                f"interface {interface} has the address {address} on {other} and on {node}, "
                "which cannot reach each other by it. Set HOROVOD_GLOO_IFACE to another"
            )


def find(address: str, first_port: int, key: bytes) -> tuple[int, str] | None:
    """Return port and token of the rendezvous that proves the key, or None."""
    for port in range(first_port, first_port + PORTS):
        nonce = guard.nonce()
        greeting = request(address, port, f"/hello/{nonce}") or b""
        own_nonce, _, proof = greeting.decode(errors="replace").partition(" ")
        if guard.proves(proof, key, "rendezvous", address, port, nonce, own_nonce):
            return port, guard.prove(key, "rank", own_nonce)
    return None


def join(
    address: str, first_port: int, rank: int, chosen: str, key: bytes, patience: float
) -> tuple[int, str]:
    """Join the rendezvous, wait until all ranks have joined, and return its port and token.

    chosen: `NODE INTERFACE ADDRESS` of this rank.
    StartError: not within `patience` s.
    """
    deadline, joined = time.monotonic() + patience, None
    while time.monotonic() < deadline:
        if not joined:
            joined = find(address, first_port, key)
            if joined:
                port, token = joined
                path = f"/{token}/started/{rank}"
                if request(address, port, path, put=chosen.encode()) is None:
                    joined = None
        elif request(address, joined[0], f"/{joined[1]}/go/all"):
            return joined
        time.sleep(PAUSE)
    if joined:
        raise StartError(
            f"not all ranks joined the rendezvous at {address}:{joined[0]} within {patience:.0f} s",
            code=1,
        )
    raise StartError(
        f"no answer from rank 0's rendezvous at {address}, ports {first_port} to "
        f"{first_port + PORTS - 1}, within {patience:.0f} s: rank 0 has not started or has another "
        "MGD_SECRET, a firewall blocks the ports, or the address is wrong (MGD_NODE_ADDRESSES)",
        code=1,
    )
