"""The rendezvous that rank 0 serves while Horovod starts: Horovod's own small HTTP server, only for the job's ranks.

A rank looks for it at PORTS ports, each of which another program may have taken:

    rank   GET /hello/NONCE
    rank 0 OWN_NONCE HMAC(key, "rendezvous", address, port, NONCE, OWN_NONCE)    so this port is rank 0's
    rank   PUT /TOKEN/started/RANK with TOKEN = HMAC(key, "rank", OWN_NONCE)     so this client is a rank

Every request except the first has the token. Horovod's own client cannot compute an HMAC, but takes the token as the
first part of its path (`horovod_address`).
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

PORTS = 8  # so many ports are tried from the job's own on
PAUSE = 0.2  # s between two requests
ANSWER = 3.0  # s for an answer: of eight ports, seven may be a stranger's that does not answer
REQUEST = 10.0  # s for a whole request
HEAD = 4096  # bytes of a request's or an answer's head
# Gloo puts a host name of a rank and, twice, 136 bytes for each other rank.
PER_PUT = 1024  # bytes, of a key and all that does not grow with the ranks
PER_PAIR = 256  # bytes, of what a rank puts for another rank

HELLO = re.compile(r"/hello/([0-9a-f]{32})")
PATH = re.compile(
    r"/([0-9a-f]{64})(?::\d+)?(/[\w.-]{1,255}/[\w.-]{1,64})", re.ASCII
)  # Gloo adds the port
STARTED = re.compile(rb"[!-~]{1,255} [!-~]{1,64} [\d.]{7,15}")
LENGTH = re.compile(r"\d{1,9}", re.ASCII)


class Handler(RendezvousHandler):
    """Horovod's handler, for requests with the token, of a bounded size and time."""

    server: "Server"
    rfile: io.BufferedReader
    path: str

    def setup(self) -> None:
        """Bound what the client can send, and the time that it has."""
        super().setup()
        self.rfile.close()
        self.rfile = guard.bounded(self.connection, HEAD + self.server.largest, REQUEST)

    def parse_request(self) -> bool:
        """Read the request's head; whether it is one of GET, PUT and DELETE with the token. Answer any other."""
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
        """Store the value of a key, if the request is complete and the store has room."""
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
    """Horovod's rendezvous of `size` ranks, on one address of rank 0's machine, for ranks that prove the key."""

    def __init__(self, address: str, port: int, allowed: set[str], size: int, key: bytes):
        super().__init__((address, port), Handler, verbose=False)
        self.at, self.allowed, self.size, self.key = (address, port), allowed, size, key
        self.most = 64 + 2 * size
        self.nonce = guard.nonce()
        self.token = guard.prove(key, "rank", self.nonce)
        self.largest = PER_PUT + PER_PAIR * size  # bytes of a value
        self.room = size * (
            16 * PER_PUT + 2 * PER_PAIR * size
        )  # bytes of keys and values that can still be put
        self.refused: set[str] = set()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the client is on one of the job's nodes. Name the first few others, once each."""
        client = client_address[0]
        if client not in self.allowed and client not in self.refused and len(self.refused) < 8:
            self.refused.add(client)
            print(
                f"refused {client} at the rendezvous, which answers {', '.join(sorted(self.allowed))}: if it is a node of "
                "this job, give its address in MGD_NODE_ADDRESSES",
                flush=True,
            )
        return super().verify_request(request, client_address)

    def greeting(self, nonce: str) -> str:
        """Return the own nonce, and the proof that this address and port are rank 0's."""
        return f"{self.nonce} {guard.prove(self.key, 'rendezvous', *self.at, nonce, self.nonce)}"

    def admits(self, token: str) -> bool:
        """Whether a client has the key, by its token."""
        return guard.proves(token, self.key, "rank", self.nonce)

    def store(self, scope: str, key: str, value: bytes) -> HTTPStatus:
        """Store a value, if it is well-formed and there is room; return the status for the client."""
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
        """The ranks that have come, each with `NODE INTERFACE ADDRESS`."""
        with self.cache_lock:
            return {
                int(rank): value.decode() for rank, value in self.cache.get("started", {}).items()
            }

    def go(self) -> None:
        """Let all ranks start Horovod."""
        with self.cache_lock:
            self.cache["go"] = {"all": b"1"}


def serve(address: str, first_port: int, allowed: set[str], size: int, key: bytes) -> Server:
    """Return the running rendezvous, at the first port from `first_port` on that is free. StartError: none is."""
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
    """Return the address from which Horovod's client makes its URLs, so that each has the token.

    Horovod appends `:PORT/SCOPE/KEY` to it (HTTPStore in horovod/common/gloo/http_store.h).
    """
    return f"{address}:{port}/{token}"


def request(address: str, port: int, path: str, put: bytes | None = None) -> bytes | None:
    """Return what a server has at `path`, or put it there; None if it has not or does not answer."""
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
        if known.get(node) != known.get(other):
            raise StartError(
                f"interface {interface} has the address {address} on {other} and on {node}, which cannot reach each other by it: "
                "choose another by HOROVOD_GLOO_IFACE"
            )


def find(address: str, first_port: int, key: bytes) -> tuple[int, str] | None:
    """Return the port of the rendezvous that proves the key, and the token for it; None if none does."""
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
    """Put this rank's `NODE INTERFACE ADDRESS`, wait until all ranks have done so; return port and token.

    StartError: not in `patience` s.
    """
    deadline, found = time.monotonic() + patience, None
    while time.monotonic() < deadline:
        if not found:
            found = find(address, first_port, key)
            if (
                found
                and request(address, found[0], f"/{found[1]}/started/{rank}", put=chosen.encode())
                is None
            ):
                found = None
        elif request(address, found[0], f"/{found[1]}/go/all"):
            return found
        time.sleep(PAUSE)
    if found:
        raise StartError(
            f"not all ranks came to the rendezvous at {address}:{found[0]} in {patience:.0f} s",
            code=1,
        )
    raise StartError(
        f"no answer from rank 0's rendezvous at {address}, ports {first_port} to {first_port + PORTS - 1}, in {patience:.0f} s: "
        "rank 0 has not started or has another MGD_SECRET, or a firewall or a wrong address (MGD_NODE_ADDRESSES) is between",
        code=1,
    )
