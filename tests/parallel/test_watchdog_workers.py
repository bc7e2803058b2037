import socket
import threading
import time

import horovod.torch as hvd
import torch

from batches import write_numbered
from job.data.views import CentreViews
from job.gradients import Gradients


def seen_while_waiting(look, wait) -> list:
    """What `look()` gives on rank 0 while it waits for the others, who come later, in `wait()`; nothing on the others."""
    seen = []
    looking = threading.Thread(target=lambda: (time.sleep(0.5), seen.append(look())))
    if hvd.rank() == 0:
        looking.start()
    else:
        time.sleep(1.5)
    wait()
    if hvd.rank() == 0:
        looking.join()
    return seen


def test_a_worker_that_waits_says_for_what_and_the_others_say_where_they_are(run):
    report = seen_while_waiting(lambda: run.watchdog.report(7.2), lambda: run.total(loss=1.0))
    if hvd.rank() == 0:
        first, *others = report[0].split("; ")
        assert first.startswith("rank 0 on ") and first.endswith(" for 7 s")
        assert "waits for 'total' at job/run/run.py:" in first
        assert len(others) == hvd.size() - 1
        for rank, other in enumerate(others, 1):
            assert other.startswith(f"rank {rank} on ") and "is at tests/parallel/test_watchdog_workers.py:" in other


def test_a_worker_that_waits_for_a_gradient_names_it(run):
    net = torch.nn.Linear(3, 2)
    gradients = Gradients(net.named_parameters())

    def step():
        gradients.clear()
        net(torch.ones(1, 3)).sum().backward()
        gradients.wait()

    said = seen_while_waiting(run.watchdog.doing, step)
    for text in said:
        assert text.startswith("waits for the gradient of bias at ")


class Slow(CentreViews):
    """Views that take a second each."""

    def __getitem__(self, index):
        time.sleep(1)
        return super().__getitem__(index)


def test_a_worker_without_a_batch_names_what_is_read(run, tmp_path):
    images = write_numbered(tmp_path)
    said = []
    looking = threading.Thread(target=lambda: (time.sleep(0.5), said.append(run.watchdog.doing())))
    batches = run.batches(Slow(images, 16), [[2], [5]], 0)
    next(batches)
    looking.start()
    next(batches)
    looking.join()
    assert said[0].startswith("has no batch for ") and f"its loader process reads {images.path(2)}, at job/data/" in said[0]
    assert run.watchdog.doing().startswith("is at ")


def test_the_wait_is_counted_for_one_collective_alone(run):
    def waits():
        first = run.watchdog.waited()
        time.sleep(0.3)
        return first, run.watchdog.waited()

    for _ in range(2):
        for first, second in seen_while_waiting(waits, lambda: hvd.allreduce(torch.ones(2), name="watched")):
            assert first < 0.7 and 0.25 < second - first < 1
    assert run.watchdog.waited() < 0.1


def test_a_higher_rank_leaves_the_report_to_a_lower_one_that_waits(run):
    hvd.barrier()
    if hvd.rank() == 0:
        time.sleep(1)
    seen = []
    if hvd.rank() == 1:
        looking = threading.Thread(target=lambda: (time.sleep(2), seen.append(run.watchdog.report(5))))
        looking.start()
    if hvd.rank() == hvd.size() - 1:
        time.sleep(4)
    hvd.allreduce(torch.ones(2), name="watched")
    if hvd.rank() == 1:
        looking.join()
        assert seen == [""]


def test_strangers_get_no_answer(run):
    address = run.watchdog.server.getsockname()
    with socket.create_connection(address, timeout=5, source_address=("127.0.0.3", 0)) as stranger:
        assert stranger.recv(100) == b""
    with socket.create_connection(address, timeout=5) as friend:
        assert friend.recv(100).startswith(b"is at ")
