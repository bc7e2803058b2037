"""Rank 0's rendezvous: clients, limits, proofs of the key, and errors."""

import re
import socket
import socketserver
import threading
import time

import pytest

from job.cluster import guard
from job.cluster import rendezvous as module
from job.errors import StartError
from job.cluster.rendezvous import PORTS, check_interfaces, find, join, request, serve, wait_for_all

KEY = b"a key of this test"
LOCATION = b"node1 lo 127.0.0.1"


@pytest.fixture
def free_port():
    """The first of PORTS free ports."""
    for port in range(31000, 60000, PORTS):
        if all(socket.socket().connect_ex(("127.0.0.1", port + offset)) for offset in range(PORTS)):
            return port


@pytest.fixture
def rendezvous(free_port):
    """Start a rendezvous of 3 ranks on 127.0.0.1."""
    server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 3, KEY)
    yield server
    server.shutdown()
    server.server_close()


def put(server, path, value):
    """Put a value as a rank. Return the answer."""
    return request(*server.server_address, f"/{server.token}{path}", put=value)


def get(server, path):
    """Get a path as a rank. Return the answer."""
    return request(*server.server_address, f"/{server.token}{path}")


def test_get_returns_a_put_value(rendezvous):
    assert get(rendezvous, "/global/3") is None
    assert put(rendezvous, "/global/3", b"where I am") == b""
    assert get(rendezvous, "/global/3") == b"where I am"


def test_server_listens_on_its_address_only(rendezvous):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", rendezvous.server_address[1]), timeout=5)


def test_server_answers_nodes_of_the_job_only(rendezvous, capfd):
    """It logs each of the first strangers once."""
    for last in [3, 3, *range(4, 20)]:
        with socket.create_connection(
            rendezvous.server_address, timeout=5, source_address=(f"127.0.0.{last}", 0)
        ) as stranger:
            stranger.sendall(f"GET /hello/{guard.nonce()} HTTP/1.1\r\n\r\n".encode())
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                pass
    log = capfd.readouterr().out
    assert log.count("refused 127.0.0.3 at the rendezvous, which answers 127.0.0.1") == 1
    assert log.count("\n") == 8


def test_incomplete_request_is_ignored(rendezvous, capfd):
    with socket.create_connection(rendezvous.server_address) as client:
        client.sendall(
            f"PUT /{rendezvous.token}/a/b HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc".encode()
        )
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert get(rendezvous, "/a/b") is None
    assert capfd.readouterr().err == ""


def send(address, request: bytes) -> bytes:
    """Send bytes to the rendezvous. Return the answer."""
    with socket.create_connection(address, timeout=15) as client:
        try:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            return client.makefile("rb").read()
        except OSError:  # the server has not read all bytes
            return b""


def status(address, method, path, body=b"") -> int:
    """Return the status of the answer to a request."""
    head = f"{method} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    return int(send(address, head.encode() + body).split()[1])


@pytest.mark.parametrize("length", ["1793", "99999999999999", "9" * 3000, "-1", "x", ""])
def test_large_put_is_refused_unread(rendezvous, length):
    head = f"PUT /{rendezvous.token}/a/b HTTP/1.0\r\nContent-Length: {length}\r\n\r\n"
    assert send(rendezvous.server_address, head.encode()).startswith(b"HTTP/1.0 413 ")
    assert "a" not in rendezvous.cache
    assert put(rendezvous, "/a/b", bytes(1792)) == b""


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_client_without_the_token_is_refused(rendezvous, free_port, method):
    # An earlier start of the job, whose token was recorded.
    other = serve("127.0.0.1", free_port + 4, {"127.0.0.1"}, 3, KEY)
    other.shutdown()
    other.server_close()
    put(rendezvous, "/started/1", LOCATION)
    statuses = {"": 400, "/": 400, "/abc": 400, f"/{'0' * 64}": 403, f"/{other.token}": 403}
    for token, expected in statuses.items():
        path = f"{token}/started/1"
        code = status(rendezvous.server_address, method, path, b"node2 lo 127.0.0.1")
        assert code == expected
    assert rendezvous.started() == {1: LOCATION.decode()}


RANKS = ("x", "-1", "3", "1/2", "", "\u0661", "1" * 65)
VALUES = (b"", b"1", b"a b", b"a b c d", b"n lo \xff", b"n \x1b[2J 10.0.0.1", b"n\n lo 1")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"/started/{rank}", LOCATION) for rank in RANKS),
        *(("/started/1", value) for value in VALUES),
        ("/go/all", b"1"),
        ("/started", LOCATION),
        ("/global/../1", b"1"),
        ("/global/%2e", b"1"),
    ],
)
def test_malformed_put_is_refused(rendezvous, path, value):
    assert status(rendezvous.server_address, "PUT", f"/{rendezvous.token}{path}", value) == 400
    assert rendezvous.cache == {}
    for rank in (1, 2):
        put(rendezvous, f"/started/{rank}", LOCATION)
    wait_for_all(rendezvous, 3, 5)


@pytest.mark.parametrize(
    "noise",
    [
        b"\0" * 9000,
        b"\xff\n\n",
        b"PUT\r\n\r\n",
        b"GET /\r\n",
        b"\r\n" * 9,
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_noise_is_ignored(rendezvous, noise, capfd):
    send(rendezvous.server_address, noise)
    assert find(*rendezvous.server_address, KEY) == (rendezvous.server_address[1], rendezvous.token)
    assert capfd.readouterr() == ("", "")


def test_many_large_puts_need_no_memory(rendezvous):
    """A stranger's puts are refused. A rank's puts have a limit."""
    body = bytes(2**20)
    for number in range(400):
        with socket.create_connection(rendezvous.server_address, timeout=15) as client:
            try:
                head = f"PUT /started/{number} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
            except OSError:
                pass  # refused unread
    assert rendezvous.cache == {}
    paths = [f"/{rendezvous.token}/scope/{number}" for number in range(400)]
    answers = [status(rendezvous.server_address, "PUT", path, bytes(1000)) for path in paths]
    assert answers == [200] * answers.count(200) + [507] * answers.count(507)
    assert 20_000 < sum(map(len, rendezvous.cache["scope"].values())) < 60_000


@pytest.mark.parametrize("size", [1, 2, 48])
def test_puts_of_gloo_fit_twice(free_port, size):
    """A rank puts a host name in each scope, and 136 bytes for each other rank of it.

    All ranks are on one node.
    """
    server = serve("127.0.0.1", free_port, {"127.0.0.1"}, size, KEY)
    try:
        for _ in range(2):  # Gloo tries again
            for rank in range(size):
                for scope, ranks in (
                    ("global", size),
                    (f"local_{'n' * 64}", size),
                    (f"cross_{rank}", 1),
                ):
                    assert server.store(scope, f"rank_{rank}", b"h" * 64) == 200
                    assert server.store(scope, str(rank), bytes(136 * (ranks - 1))) == 200
                location = b"n" * 64 + b" eth0 100.100.100.100"
                assert server.store("started", str(rank), location) == 200
    finally:
        server.shutdown()
        server.server_close()


def test_slow_clients_are_disconnected(rendezvous, monkeypatch):
    monkeypatch.setattr(module, "REQUEST", 1.0)
    slow = [socket.create_connection(rendezvous.server_address, timeout=30) for _ in range(30)]
    assert put(rendezvous, "/started/1", LOCATION) == b""
    with pytest.raises(OSError):
        for _ in range(600):  # each byte is in time
            slow[0].sendall(b"G")
            time.sleep(0.1)
    for client in slow[1:]:
        assert client.recv(100) == b""
        client.close()


def test_connections_have_a_limit(rendezvous):
    rendezvous.most = 3
    idle = [socket.create_connection(rendezvous.server_address, timeout=5) for _ in range(4)]
    assert idle[0].recv(100) == b""
    assert put(rendezvous, "/started/1", LOCATION) == b""
    assert len(rendezvous.connections) <= 3
    for client in idle:
        client.close()


def test_server_serves_no_files(rendezvous):
    """Horovod's server is a subclass of a file server."""
    for line in ("HEAD /", "HEAD /README.md", "HEAD /job/id", "GET /README.md", "GET /etc/passwd"):
        for path in (line, line.replace("/", f"/{rendezvous.token}/", 1)):
            answer = send(rendezvous.server_address, f"{path} HTTP/1.0\r\n\r\n".encode())
            assert answer.split()[1] in (b"501", b"400", b"404"), path
            assert b"Content-Length: 0" in answer and b"Last-Modified" not in answer, path


def test_serve_skips_a_used_port(free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 3, KEY)
        try:
            assert server.server_address[1] == free_port + 1
        finally:
            server.shutdown()
            server.server_close()


def test_serve_needs_a_free_port(free_port):
    used = [socket.create_server(("127.0.0.1", free_port + offset)) for offset in range(PORTS)]
    try:
        problem = f"no rendezvous at 127.0.0.1, ports {free_port} to .*Address already in use"
        with pytest.raises(StartError, match=problem):
            serve("127.0.0.1", free_port, set(), 3, KEY)
    finally:
        for server in used:
            server.close()


def test_serve_needs_an_address_of_this_machine(free_port):
    problem = "no rendezvous at 203.0.113.9, .*Cannot assign requested address"
    with pytest.raises(StartError, match=problem):
        serve("203.0.113.9", free_port, set(), 3, KEY)


def joined(port, rank, patience, key=KEY):
    """Call `join` in a thread. Return the thread and a list for its result or error."""
    ends = []

    def run():
        try:
            ends.append(join("127.0.0.1", port, rank, LOCATION.decode(), key, patience))
        except StartError as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def test_ranks_wait_for_the_last_one(free_port):
    # Another program has the first port, and never answers.
    with socket.create_server(("127.0.0.1", free_port)) as silent:
        threads = [joined(free_port, 1, 60)]
        server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 3, KEY)
        try:
            waiting = threading.Thread(target=wait_for_all, args=(server, 3, 60))
            waiting.start()
            time.sleep(1)
            assert waiting.is_alive()
            threads.append(joined(free_port, 2, 60))
            waiting.join(30)
            assert server.started() == dict.fromkeys((1, 2), "node1 lo 127.0.0.1")
            server.go()
            for thread, ends in threads:
                thread.join(30)
                assert ends == [(free_port + 1, server.token)]
        finally:
            server.shutdown()
            server.server_close()
        silent.close()


class Impostor(socketserver.ThreadingTCPServer):
    """Another user's server at a port of the rendezvous.

    It answers 200 and `body(request line)`.
    """

    allow_reuse_address = True
    daemon_threads = True

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            line = self.rfile.readline()
            self.server.seen.append(line)
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + self.server.body(line))

    def __init__(self, port, body):
        super().__init__(("127.0.0.1", port), self.Handler)
        self.body, self.seen = body, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


def echo(port):
    """Answer with the request."""
    return lambda line: line


def version(port):
    """Answer with the version of an earlier rendezvous."""
    return lambda line: b"7.0.0"


def own_proof(port):
    """Answer with a greeting that proves another key."""

    def answer(line):
        nonce = re.search(rb"hello/(\w+)", line)
        text = nonce[1].decode() if nonce else ""
        proof = guard.prove(b"another key", "rendezvous", "127.0.0.1", port, text, "0" * 32)
        return f"{'0' * 32} {proof}".encode()

    return answer


def replay(port):
    """Answer with a recorded greeting of the real rendezvous."""
    recorded = []

    def answer(line):
        recorded.append(request("127.0.0.1", port + 1, f"/hello/{'0' * 32}"))
        return recorded[0]

    return answer


def relay(port):
    """Answer with the real rendezvous's answer to the same request."""
    return lambda line: request("127.0.0.1", port + 1, line.split()[1].decode()) or b""


def endless(port):
    """Answer with more than a rank reads."""
    return lambda line: b"x" * 2**24


@pytest.mark.parametrize("answer", [echo, version, own_proof, replay, relay, endless])
def test_join_skips_an_impostor_and_sends_it_no_token(free_port, answer):
    impostor = Impostor(free_port, answer(free_port))
    server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 2, KEY)
    try:
        thread, ends = joined(free_port, 1, 60)
        wait_for_all(server, 2, 60)
        server.go()
        thread.join(60)
        assert ends == [(free_port + 1, server.token)]
        assert impostor.seen and all(line.startswith(b"GET /hello/") for line in impostor.seen)
    finally:
        for each in (impostor, server):
            each.shutdown()
            each.server_close()


def test_join_ignores_the_rendezvous_of_another_job(rendezvous):
    thread, ends = joined(rendezvous.server_address[1], 1, 1, key=b"another job's")
    thread.join(20)
    assert "no answer from rank 0's rendezvous at 127.0.0.1" in str(ends[0])
    assert ends[0].code == 1
    assert rendezvous.started() == {}


def test_wait_for_all_names_missing_ranks(rendezvous):
    put(rendezvous, "/started/1", LOCATION)
    problem = "rank 2 of 3 did not join the rendezvous within 0 s.*MGD_START_SECONDS"
    with pytest.raises(StartError, match=problem):
        wait_for_all(rendezvous, 3, 0.3)


def test_join_reports_missing_ranks(rendezvous):
    thread, ends = joined(rendezvous.server_address[1], 1, 1)
    thread.join(20)
    assert "not all ranks joined the rendezvous" in str(ends[0])


@pytest.mark.parametrize("interface, address", [("lo", "127.0.0.1"), ("docker0", "172.17.0.1")])
def test_check_interfaces_needs_different_addresses(interface, address):
    chosen = [f"node{number} {interface} {address}" for number in (1, 1, 2)]
    nodes = {"node1": "10.0.0.1", "node2": "10.0.0.2"}
    problem = f"interface {interface} has the address {address} on node1 and on node2"
    with pytest.raises(StartError, match=f"{problem}.*HOROVOD_GLOO_IFACE"):
        check_interfaces(nodes, chosen)
    check_interfaces({"node1": "10.0.0.1", "node2": "10.0.0.1"}, chosen)  # one machine as two nodes
    check_interfaces(nodes, ["node1 ib0 10.1.0.1", "node1 ib0 10.1.0.1", "node2 ib0 10.1.0.2"])
