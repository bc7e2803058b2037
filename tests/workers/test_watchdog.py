"""The watchdog: reports of waiting workers, and which clients get an answer."""

import contextlib
import os
import re
import socket
import threading
import time

import pytest
import torch

from batches import write_numbered
from job.cluster import comm
from job.data.views import CentreViews
from job.engine.gradients import Gradients
from job.cluster import guard, watchdog

pytestmark = pytest.mark.skipif(
    os.environ.get("HOROVOD_SIZE", "1") == "1", reason="one worker has no watchdog"
)


def seen_while_waiting(look, wait) -> list:
    """Return [look()] on rank 0, called while it waits in `wait()` for the others; [] on those."""
    seen = []
    thread = threading.Thread(target=lambda: (time.sleep(0.5), seen.append(look())))
    if comm.rank() == 0:
        thread.start()
    else:
        time.sleep(1.5)
    wait()
    if comm.rank() == 0:
        thread.join()
    return seen


def test_report_names_collective_and_locations(run):
    report = seen_while_waiting(lambda: run.watchdog.report(7.2), lambda: run.total(loss=1.0))
    if comm.rank() == 0:
        first, *others = report[0].split("; ")
        assert first.startswith("rank 0 on ") and first.endswith(" for 7 s")
        assert "waits for 'total' at job/engine/totals.py:" in first
        assert len(others) == comm.size() - 1
        for rank, other in enumerate(others, 1):
            assert (
                other.startswith(f"rank {rank} on ")
                and "is at tests/workers/test_watchdog.py:" in other
            )


def test_doing_names_the_gradient(run):
    net = torch.nn.Linear(3, 2)
    gradients = Gradients(net.named_parameters())

    def step():
        gradients.clear()
        net(torch.ones(1, 3)).sum().backward()
        gradients.wait()

    for text in seen_while_waiting(run.watchdog.doing, step):
        assert text.startswith("waits for 'gradients.bias' at job/engine/gradients.py:")


class Slow(CentreViews):
    """Views that need a second each."""

    def __getitem__(self, index):
        time.sleep(1)
        return super().__getitem__(index)


def test_doing_names_the_file_that_is_read(run, tmp_path):
    images = write_numbered(tmp_path)
    seen = []
    thread = threading.Thread(target=lambda: (time.sleep(0.5), seen.append(run.watchdog.doing())))
    batches = run.batches(Slow(images, 16), [[2], [5]], 0)
    next(batches)
    thread.start()
    next(batches)
    thread.join()
    assert seen[0].startswith("has no batch for ")
    assert f"its loader process reads {images.path(2)}, at job/data/" in seen[0]
    assert run.watchdog.doing().startswith("is at ")


def test_waited_counts_only_the_current_collective(run):
    def waits():
        first = run.watchdog.waited()
        time.sleep(0.3)
        return first, run.watchdog.waited()

    for _ in range(2):
        for first, second in seen_while_waiting(
            waits, lambda: comm.total(torch.ones(2), "watched")
        ):
            assert first < 0.7 and 0.25 < second - first < 1
    assert run.watchdog.waited() < 0.1


def test_only_the_lowest_waiting_rank_reports(run):
    comm.total(torch.ones(1), "together")
    if comm.rank() == 0:
        time.sleep(1)
    seen = []
    if comm.rank() == 1:
        thread = threading.Thread(
            target=lambda: (time.sleep(2), seen.append(run.watchdog.report(5)))
        )
        thread.start()
    if comm.rank() == comm.size() - 1:
        time.sleep(4)
    comm.total(torch.ones(2), "watched")
    if comm.rank() == 1:
        thread.join()
        assert seen == [""]


def own(run) -> tuple[str, int]:
    """Return address and port of this worker's watchdog."""
    return run.watchdog.server.server_address


def test_client_with_the_key_gets_an_answer(run):
    assert run.watchdog.ask(run.rank).startswith("is at ")


def test_client_of_another_address_gets_no_answer(run):
    with socket.create_connection(own(run), timeout=5, source_address=("127.0.0.3", 0)) as stranger:
        assert stranger.recv(100) == b""


@pytest.mark.parametrize(
    "line", ["", "\n", "a b\n", "a " + "0" * 64 + "\n", "\0" * 20000, "ü ü\n"], ids=range(6)
)
def test_client_without_the_key_gets_only_a_nonce(run, line):
    with socket.create_connection(own(run), timeout=15) as stranger:
        try:
            stranger.sendall(line.encode())
            stranger.shutdown(socket.SHUT_WR)
            assert re.fullmatch(rb"[0-9a-f]{32}\n", stranger.makefile("rb").read())
        except OSError:
            assert len(line) > watchdog.LINE  # closed before the line is read
    assert run.watchdog.ask(run.rank).startswith("is at ")


def test_recorded_proof_gets_no_answer(run):
    key = run.watchdog.server.key
    with (
        socket.create_connection(own(run), timeout=5) as worker,
        socket.create_connection(own(run), timeout=5) as stranger,
    ):
        own_nonce = worker.makefile().readline().strip()
        proof = f"nonce {guard.prove(key, 'ask', 'nonce', own_nonce)}\n".encode()
        worker.sendall(proof)
        assert b" is at " in worker.makefile("rb").read()
        stranger.sendall(proof)
        assert len(stranger.makefile("rb").read()) == 33


def test_silent_clients_do_not_block_answers(run):
    silent = [socket.create_connection(own(run), timeout=30) for _ in range(100)]
    assert run.watchdog.ask(run.rank).startswith("is at ")
    for client in silent:
        assert len(client.makefile("rb").read()) == 33  # closed after a timeout
        client.close()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n\n",
        "waits for 'x' at y",
        "a\n\x1b[2J b\n",
        "a\n" + "0" * 64 + " is at z\n",
        "x" * 2**20,
    ],
    ids=range(6),
)
def test_answer_of_another_process_is_rejected(run, monkeypatch, answer):
    """Another process can use the port of a worker that has ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with server.accept()[0] as connection, contextlib.suppress(OSError):
                connection.sendall(answer.encode())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        threading.Thread(target=serve, daemon=True).start()
        node, _, _, key = run.watchdog.peers[run.rank]
        peers = [*run.watchdog.peers, (node, *server.getsockname(), key)]
        monkeypatch.setattr(run.watchdog, "peers", peers)
        assert run.watchdog.ask(len(peers) - 1) == ""


def test_doing_is_printable(run, monkeypatch):
    monkeypatch.setattr(watchdog, "location", lambda frame: "a\x1b[2J\nb\udcff")
    assert run.watchdog.ask(run.rank) == run.watchdog.doing() == "is at a?[2J?b?"
