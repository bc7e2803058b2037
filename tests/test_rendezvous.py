import socket
import threading
import time

import pytest

from job.errors import RunError
from job.run.rendezvous import PORTS, StartError, ask, check_interfaces, join, serve, wait_for_all


@pytest.fixture
def free_port():
    """The first of PORTS ports that nobody listens on."""
    for port in range(31000, 60000, PORTS):
        if all(socket.socket().connect_ex(("127.0.0.1", port + offset)) for offset in range(PORTS)):
            return port


@pytest.fixture
def rendezvous(free_port):
    """A running rendezvous on 127.0.0.1."""
    server = serve("127.0.0.1", free_port, {"127.0.0.1"}, "7.0.0")
    yield server
    server.shutdown()
    server.server_close()


def test_the_rendezvous_keeps_what_is_put(rendezvous):
    port = rendezvous.server_address[1]
    assert ask("127.0.0.1", port, "/job/id") == b"7.0.0"
    assert ask("127.0.0.1", port, "/global/3") is None
    assert ask("127.0.0.1", port, "/global/3", put=b"where I am") == b""
    assert ask("127.0.0.1", port, "/global/3") == b"where I am"


def test_the_rendezvous_listens_on_its_address_alone(rendezvous):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", rendezvous.server_address[1]), timeout=5)


def test_the_rendezvous_answers_the_job_s_nodes_alone_and_names_others_once(rendezvous, capfd):
    address = rendezvous.server_address
    for _ in range(2):
        with socket.create_connection(address, timeout=5, source_address=("127.0.0.3", 0)) as stranger:
            stranger.sendall(b"GET /job/id HTTP/1.1\r\n\r\n")
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                pass
    said = capfd.readouterr().out
    assert said.count("refused 127.0.0.3 at the rendezvous, which answers 127.0.0.1") == said.count("\n") == 1


def test_a_client_that_goes_in_the_middle_of_a_request_is_passed_over(rendezvous, capfd):
    with socket.create_connection(rendezvous.server_address) as client:
        client.sendall(b"PUT /a/b HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nabc")
    assert ask(*rendezvous.server_address, "/job/id") == b"7.0.0"
    assert capfd.readouterr().err == ""


def send(address, request: bytes) -> bytes:
    """What the rendezvous answers to these bytes."""
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(request)
        return client.makefile("rb").read()


@pytest.mark.parametrize("length", ["1048577", "99999999999999", "-1", "x", ""])
def test_what_is_larger_than_anything_that_ranks_put_is_refused_unread(rendezvous, length):
    said = send(rendezvous.server_address, f"PUT /a/b HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.0 413 ")
    assert "a" not in rendezvous.cache
    assert ask(*rendezvous.server_address, "/a/b", put=bytes(1048576)) == b""


def test_the_rendezvous_tells_nothing_of_files(rendezvous):
    """Horovod's server descends from one of files."""
    for request in ("HEAD /", "HEAD /README.md", "HEAD /job/id", "GET /README.md", "GET /etc/passwd"):
        said = send(rendezvous.server_address, f"{request} HTTP/1.0\r\n\r\n".encode())
        assert said.split()[1] in (b"501", b"400", b"404"), request
        assert b"Content-Length: 0" in said and b"Last-Modified" not in said, request


def test_a_taken_port_gives_way_to_the_next(free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        server = serve("127.0.0.1", free_port, {"127.0.0.1"}, "7.0.0")
        try:
            assert server.server_address[1] == free_port + 1
        finally:
            server.shutdown()
            server.server_close()


def test_no_free_port_is_one_line(free_port):
    taken = [socket.create_server(("127.0.0.1", free_port + offset)) for offset in range(PORTS)]
    try:
        with pytest.raises(StartError, match=f"no rendezvous at 127.0.0.1, ports {free_port} to .*Address already in use"):
            serve("127.0.0.1", free_port, set(), "7.0.0")
    finally:
        for server in taken:
            server.close()


def test_an_address_of_another_machine_is_one_line(free_port):
    with pytest.raises(StartError, match="no rendezvous at 203.0.113.9, .*Cannot assign requested address"):
        serve("203.0.113.9", free_port, set(), "7.0.0")


def joined(port, rank, patience, job="7.0.0"):
    """What `join` ends with, in a thread: a port, or its error."""
    ends = []

    def run():
        try:
            ends.append(join("127.0.0.1", port, rank, "node1 lo 127.0.0.1", job, patience))
        except StartError as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def test_all_wait_for_the_last_and_find_the_port(free_port):
    with socket.create_server(("127.0.0.1", free_port)) as silent:  # another program's: it listens and never answers
        threads = [joined(free_port, rank, 60) for rank in (1,)]
        server = serve("127.0.0.1", free_port, {"127.0.0.1"}, "7.0.0")
        try:
            waiting = threading.Thread(target=wait_for_all, args=(server, 3, 60))
            waiting.start()
            time.sleep(1)
            assert waiting.is_alive()
            threads.append(joined(free_port, 2, 60))
            waiting.join(30)
            assert server.started() == dict.fromkeys((1, 2), "node1 lo 127.0.0.1")
            server.cache["go"] = {"all": b"1"}
            for thread, ends in threads:
                thread.join(30)
                assert ends == [free_port + 1]
        finally:
            server.shutdown()
            server.server_close()
        silent.close()


def test_another_job_s_rendezvous_is_not_taken_for_the_own(rendezvous):
    thread, ends = joined(rendezvous.server_address[1], 1, 1, job="8.0.0")
    thread.join(20)
    assert "no answer from rank 0's rendezvous at 127.0.0.1" in str(ends[0])
    assert ends[0].code == 1
    assert rendezvous.started() == {}


def test_rank_0_names_those_that_do_not_come(rendezvous):
    ask(*rendezvous.server_address, "/started/1", put=b"1")
    with pytest.raises(StartError, match="rank 2 of 3 did not come to the rendezvous in 0 s.*MGD_START_SECONDS"):
        wait_for_all(rendezvous, 3, 0.3)


def test_a_rank_that_came_says_that_others_did_not(rendezvous):
    thread, ends = joined(rendezvous.server_address[1], 1, 1)
    thread.join(20)
    assert "not all ranks came to the rendezvous" in str(ends[0])


@pytest.mark.parametrize("interface, address", [("lo", "127.0.0.1"), ("docker0", "172.17.0.1")])
def test_an_interface_by_which_nodes_cannot_reach_each_other_is_refused(interface, address):
    chosen = [f"node{number} {interface} {address}" for number in (1, 1, 2)]
    with pytest.raises(
        StartError, match=f"interface {interface} has the address {address} on node1 and on node2.*HOROVOD_GLOO_IFACE"
    ):
        check_interfaces({"node1": "10.0.0.1", "node2": "10.0.0.2"}, chosen)
    check_interfaces({"node1": "10.0.0.1", "node2": "10.0.0.1"}, chosen)  # one machine as two nodes
    check_interfaces(
        {"node1": "10.0.0.1", "node2": "10.0.0.2"}, ["node1 ib0 10.1.0.1", "node1 ib0 10.1.0.1", "node2 ib0 10.1.0.2"]
    )


def test_start_errors_are_errors_for_people():
    assert issubclass(StartError, RunError)
