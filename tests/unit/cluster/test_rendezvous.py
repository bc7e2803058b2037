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
PLACE = b"node1 lo 127.0.0.1"


@pytest.fixture
def free_port():
    """The first of PORTS ports that nobody listens on."""
    for port in range(31000, 60000, PORTS):
        if all(socket.socket().connect_ex(("127.0.0.1", port + offset)) for offset in range(PORTS)):
            return port


@pytest.fixture
def rendezvous(free_port):
    """A running rendezvous of 3 ranks on 127.0.0.1."""
    server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 3, KEY)
    yield server
    server.shutdown()
    server.server_close()


def put(server, path, value):
    """What the rendezvous answers to a rank that puts a value."""
    return request(*server.server_address, f"/{server.token}{path}", put=value)


def get(server, path):
    """What the rendezvous has for a rank at a path."""
    return request(*server.server_address, f"/{server.token}{path}")


def test_the_rendezvous_keeps_what_is_put(rendezvous):
    assert get(rendezvous, "/global/3") is None
    assert put(rendezvous, "/global/3", b"where I am") == b""
    assert get(rendezvous, "/global/3") == b"where I am"


def test_the_rendezvous_listens_on_its_address_alone(rendezvous):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", rendezvous.server_address[1]), timeout=5)


def test_the_rendezvous_answers_the_job_s_nodes_alone_and_names_the_first_others_once(
    rendezvous, capfd
):
    for last in [3, 3, *range(4, 20)]:
        with socket.create_connection(
            rendezvous.server_address, timeout=5, source_address=(f"127.0.0.{last}", 0)
        ) as stranger:
            stranger.sendall(f"GET /hello/{guard.nonce()} HTTP/1.1\r\n\r\n".encode())
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                pass
    said = capfd.readouterr().out
    assert said.count("refused 127.0.0.3 at the rendezvous, which answers 127.0.0.1") == 1
    assert said.count("\n") == 8


def test_a_client_that_goes_in_the_middle_of_a_request_is_passed_over(rendezvous, capfd):
    with socket.create_connection(rendezvous.server_address) as client:
        client.sendall(
            f"PUT /{rendezvous.token}/a/b HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc".encode()
        )
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert get(rendezvous, "/a/b") is None
    assert capfd.readouterr().err == ""


def send(address, request: bytes) -> bytes:
    """What the rendezvous answers to these bytes."""
    with socket.create_connection(address, timeout=15) as client:
        try:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            return client.makefile("rb").read()
        except OSError:  # it has not read all of them
            return b""


def status(address, method, path, body=b"") -> int:
    """The status of the rendezvous's answer."""
    return int(
        send(
            address,
            f"{method} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body,
        ).split()[1]
    )


@pytest.mark.parametrize("length", ["1793", "99999999999999", "9" * 3000, "-1", "x", ""])
def test_what_is_larger_than_anything_that_ranks_put_is_refused_unread(rendezvous, length):
    head = f"PUT /{rendezvous.token}/a/b HTTP/1.0\r\nContent-Length: {length}\r\n\r\n"
    assert send(rendezvous.server_address, head.encode()).startswith(b"HTTP/1.0 413 ")
    assert "a" not in rendezvous.cache
    assert put(rendezvous, "/a/b", bytes(1792)) == b""


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_client_without_the_token_is_refused(rendezvous, free_port, method):
    other = serve(
        "127.0.0.1", free_port + 4, {"127.0.0.1"}, 3, KEY
    )  # another try's: its token was recorded
    other.shutdown()
    other.server_close()
    put(rendezvous, "/started/1", PLACE)
    for token, expected in (
        ("", 400),
        ("/", 400),
        ("/abc", 400),
        (f"/{'0' * 64}", 403),
        (f"/{other.token}", 403),
    ):
        assert (
            status(rendezvous.server_address, method, f"{token}/started/1", b"node2 lo 127.0.0.1")
            == expected
        )
    assert rendezvous.started() == {1: PLACE.decode()}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"/started/{rank}", PLACE) for rank in ("x", "-1", "3", "1/2", "", "\u0661", "1" * 65)),
        *(
            ("/started/1", value)
            for value in (
                b"",
                b"1",
                b"a b",
                b"a b c d",
                b"n lo \xff",
                b"n \x1b[2J 10.0.0.1",
                b"n\n lo 1",
            )
        ),
        ("/go/all", b"1"),
        ("/started", PLACE),
        ("/global/../1", b"1"),
        ("/global/%2e", b"1"),
    ],
)
def test_a_malformed_put_is_answered_400_and_the_start_goes_on(rendezvous, path, value):
    assert status(rendezvous.server_address, "PUT", f"/{rendezvous.token}{path}", value) == 400
    assert rendezvous.cache == {}
    for rank in (1, 2):
        put(rendezvous, f"/started/{rank}", PLACE)
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
def test_noise_is_passed_over(rendezvous, noise, capfd):
    send(rendezvous.server_address, noise)
    assert find(*rendezvous.server_address, KEY) == (rendezvous.server_address[1], rendezvous.token)
    assert capfd.readouterr() == ("", "")


def test_400_large_puts_take_no_memory(rendezvous):
    """Those of a stranger are refused; a rank has room for what ranks put."""
    body = bytes(2**20)
    for number in range(400):
        with socket.create_connection(rendezvous.server_address, timeout=15) as client:
            try:
                client.sendall(
                    f"PUT /started/{number} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
            except OSError:
                pass  # refused unread
    assert rendezvous.cache == {}
    paths = [f"/{rendezvous.token}/scope/{number}" for number in range(400)]
    answers = [status(rendezvous.server_address, "PUT", path, bytes(1000)) for path in paths]
    assert answers == [200] * answers.count(200) + [507] * answers.count(507)
    assert 20_000 < sum(map(len, rendezvous.cache["scope"].values())) < 60_000


@pytest.mark.parametrize("size", [1, 2, 48])
def test_all_that_gloo_puts_has_room_twice(free_port, size):
    """For each rank of a scope a host name, and 136 bytes for each other rank; all ranks are on one node here."""
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
                assert (
                    server.store("started", str(rank), b"n" * 64 + b" eth0 100.100.100.100") == 200
                )
    finally:
        server.shutdown()
        server.server_close()


def test_slow_clients_are_cut_off_and_hold_up_nobody(rendezvous, monkeypatch):
    monkeypatch.setattr(module, "REQUEST", 1.0)
    slow = [socket.create_connection(rendezvous.server_address, timeout=30) for _ in range(30)]
    assert put(rendezvous, "/started/1", PLACE) == b""
    with pytest.raises(OSError):
        for _ in range(600):  # each byte comes in time
            slow[0].sendall(b"G")
            time.sleep(0.1)
    for client in slow[1:]:
        assert client.recv(100) == b""
        client.close()


def test_too_many_connections_close_the_oldest(rendezvous):
    rendezvous.most = 3
    idle = [socket.create_connection(rendezvous.server_address, timeout=5) for _ in range(4)]
    assert idle[0].recv(100) == b""
    assert put(rendezvous, "/started/1", PLACE) == b""
    assert len(rendezvous.connections) <= 3
    for client in idle:
        client.close()


def test_the_rendezvous_tells_nothing_of_files(rendezvous):
    """Horovod's server descends from one of files."""
    for words in ("HEAD /", "HEAD /README.md", "HEAD /job/id", "GET /README.md", "GET /etc/passwd"):
        for path in (words, words.replace("/", f"/{rendezvous.token}/", 1)):
            said = send(rendezvous.server_address, f"{path} HTTP/1.0\r\n\r\n".encode())
            assert said.split()[1] in (b"501", b"400", b"404"), path
            assert b"Content-Length: 0" in said and b"Last-Modified" not in said, path


def test_a_taken_port_gives_way_to_the_next(free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 3, KEY)
        try:
            assert server.server_address[1] == free_port + 1
        finally:
            server.shutdown()
            server.server_close()


def test_no_free_port_is_one_line(free_port):
    taken = [socket.create_server(("127.0.0.1", free_port + offset)) for offset in range(PORTS)]
    try:
        with pytest.raises(
            StartError,
            match=f"no rendezvous at 127.0.0.1, ports {free_port} to .*Address already in use",
        ):
            serve("127.0.0.1", free_port, set(), 3, KEY)
    finally:
        for server in taken:
            server.close()


def test_an_address_of_another_machine_is_one_line(free_port):
    with pytest.raises(
        StartError, match="no rendezvous at 203.0.113.9, .*Cannot assign requested address"
    ):
        serve("203.0.113.9", free_port, set(), 3, KEY)


def joined(port, rank, patience, key=KEY):
    """What `join` ends with, in a thread: a port, or its error."""
    ends = []

    def run():
        try:
            ends.append(join("127.0.0.1", port, rank, PLACE.decode(), key, patience))
        except StartError as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def test_all_wait_for_the_last_and_find_the_port(free_port):
    with socket.create_server(
        ("127.0.0.1", free_port)
    ) as silent:  # another program's: it listens and never answers
        threads = [joined(free_port, rank, 60) for rank in (1,)]
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


class StandIn(socketserver.ThreadingTCPServer):
    """Another user's server at a port of the rendezvous: it answers 200 and what `body(request line)` returns."""

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
    """A stand-in's answer: the request."""
    return lambda line: line


def words(port):
    """A stand-in's answer: what an earlier rendezvous answered to any client."""
    return lambda line: b"7.0.0"


def own_proof(port):
    """A stand-in's answer: a greeting under a key of its own."""

    def answer(line):
        nonce = re.search(rb"hello/(\w+)", line)
        proof = guard.prove(
            b"another key",
            "rendezvous",
            "127.0.0.1",
            port,
            nonce[1].decode() if nonce else "",
            "0" * 32,
        )
        return f"{'0' * 32} {proof}".encode()

    return answer


def replay(port):
    """A stand-in's answer: a greeting of the real rendezvous, asked for before."""
    recorded = []

    def answer(line):
        recorded.append(request("127.0.0.1", port + 1, f"/hello/{'0' * 32}"))
        return recorded[0]

    return answer


def relay(port):
    """A stand-in's answer: the real rendezvous's to the same request."""
    return lambda line: request("127.0.0.1", port + 1, line.split()[1].decode()) or b""


def endless(port):
    """A stand-in's answer: more than a rank reads."""
    return lambda line: b"x" * 2**24


@pytest.mark.parametrize("kind", [echo, words, own_proof, replay, relay, endless])
def test_a_stand_in_at_the_first_port_is_passed_over_and_learns_no_token(free_port, kind):
    stand_in = StandIn(free_port, kind(free_port))
    server = serve("127.0.0.1", free_port, {"127.0.0.1"}, 2, KEY)
    try:
        thread, ends = joined(free_port, 1, 60)
        wait_for_all(server, 2, 60)
        server.go()
        thread.join(60)
        assert ends == [(free_port + 1, server.token)]
        assert stand_in.seen and all(line.startswith(b"GET /hello/") for line in stand_in.seen)
    finally:
        for one in (stand_in, server):
            one.shutdown()
            one.server_close()


def test_another_job_s_rendezvous_is_not_taken_for_the_own(rendezvous):
    thread, ends = joined(rendezvous.server_address[1], 1, 1, key=b"another job's")
    thread.join(20)
    assert "no answer from rank 0's rendezvous at 127.0.0.1" in str(ends[0])
    assert ends[0].code == 1
    assert rendezvous.started() == {}


def test_rank_0_names_those_that_do_not_come(rendezvous):
    put(rendezvous, "/started/1", PLACE)
    with pytest.raises(
        StartError, match="rank 2 of 3 did not join the rendezvous within 0 s.*MGD_START_SECONDS"
    ):
        wait_for_all(rendezvous, 3, 0.3)


def test_join_reports_missing_ranks(rendezvous):
    thread, ends = joined(rendezvous.server_address[1], 1, 1)
    thread.join(20)
    assert "not all ranks joined the rendezvous" in str(ends[0])


@pytest.mark.parametrize("interface, address", [("lo", "127.0.0.1"), ("docker0", "172.17.0.1")])
def test_an_interface_by_which_nodes_cannot_reach_each_other_is_refused(interface, address):
    chosen = [f"node{number} {interface} {address}" for number in (1, 1, 2)]
    with pytest.raises(
        StartError,
        match=f"interface {interface} has the address {address} on node1 and on node2.*HOROVOD_GLOO_IFACE",
    ):
        check_interfaces({"node1": "10.0.0.1", "node2": "10.0.0.2"}, chosen)
    check_interfaces({"node1": "10.0.0.1", "node2": "10.0.0.1"}, chosen)  # one machine as two nodes
    check_interfaces(
        {"node1": "10.0.0.1", "node2": "10.0.0.2"},
        ["node1 ib0 10.1.0.1", "node1 ib0 10.1.0.1", "node2 ib0 10.1.0.2"],
    )
