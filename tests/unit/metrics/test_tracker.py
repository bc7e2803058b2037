"""Trackers: sent numbers, resumes, and servers that fail or do not answer."""

import sys
import threading

import pytest

from errors import refused
from job.config import read_config
from job.engine.call import called
from job.engine.run import Run
from job.metrics import tracker
from job.metrics.log import Log
from job.metrics.tracker import Tracker
from job.options import TRACKERS
from job.train import train

OPTIONS = {"print_freq": 2}
START = {"epoch": 0, "step": 0, "steps_an_epoch": 5, "losses": ["contrastive"]}


class Server(Tracker):
    """Send to a list while `open` is set. Message number `fails` raises an error."""

    name = "server"

    def __init__(self, fails=-1):
        super().__init__()
        self.fails, self.sent, self.open = fails, [], threading.Event()
        self.open.set()

    def add(self, *message):
        assert self.open.wait(60)
        if len(self.sent) == self.fails:
            raise ConnectionError("refused")
        self.sent.append(message)

    def start(self):
        self.add("start", self.id, self.title)
        self.use("abc")

    def send(self, steps, numbers):
        self.add(steps, numbers)

    def finish(self, how):
        self.add(how)


def trained(folder, server, first=0, last=5, **start):
    log = Log(True)
    folder.mkdir(exist_ok=True)
    log.open(str(folder), divmod(first, 5), OPTIONS, [server])
    log.record("start", **START | start)
    for step in range(first, last):
        numbers = {"loss": 1.0, "contrastive": 2.0, "distillation": 4.0}
        log.record("step", steps=step + 1, epoch=step // 5, step=step % 5, **numbers)
    return log


def warnings(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in text.splitlines() if '"warning"' in line]


def test_tracker_sends_scalars_of_tensorboard(tmp_path):
    server = Server()
    log = trained(tmp_path / "mine", server)
    log.record("knn", steps=5, epoch=1, step=0, knn=50.0)
    log.record("refresh", epoch=1, step=0, distiller="mgd", stage=4, changed=0.5)
    log.record("end", how="complete", text="", code=0)
    log.close()
    step = {"steps/loss": 1.0, "steps/contrastive": 2.0, "steps/distillation": 4.0}
    step |= {"steps/ratio": 2.0}
    assert server.sent == [
        ("start", "", "mine"),
        (2, step),
        (4, step),
        (5, step),  # an epoch's last
        (5, {"knn/knn": 50.0}),
        (5, {"refreshes/mgd/layer4/changed": 0.5}),
        ("complete",),
    ]


def test_resume_has_id_and_steps(tmp_path):
    trained(tmp_path, Server(), last=3).close()
    server, log = Server(), Log(True)
    log.open(str(tmp_path), (0, 3), OPTIONS, [server])
    log.record("start", **START | {"step": 3})
    log.record("factor", epoch=0, step=3, distiller="mgd", loss_factor=1.0)
    log.close()
    assert server.sent[:2] == [("start", "abc", tmp_path.name), (3, {"other/mgd/loss_factor": 1.0})]
    assert server.sent[2:] == [("error",)]


def test_resume_sends_no_step_twice(tmp_path):
    """The first process is killed after step 4. The second resumes from step 2."""
    servers = [Server() for _ in range(4)]
    for server, first, last in zip(servers, (0, 2, 2, 5), (4, 2, 5, 5), strict=True):
        log = trained(tmp_path, server, first, last, step=first)
        if last == 5:
            log.record("knn", steps=5, epoch=1, step=0, knn=50.0)
        server.queue.put("stopped")  # the thread ends, and no step is lost
        server.thread.join(60)
    sent = [[message[0] for message in server.sent[1:-1]] for server in servers]
    assert sent == [[2, 4], [], [5, 5], []]
    assert [list(numbers) for _, numbers in servers[2].sent[2:-1]] == [["knn/knn"]]


def test_new_id_gets_all_steps(tmp_path, monkeypatch):
    trained(tmp_path, Server()).close()
    monkeypatch.setattr(Server, "start", lambda server: server.use("another"))
    server = Server()
    trained(tmp_path, server).close()
    assert [message[0] for message in server.sent] == [2, 4, 5, "error"]


def messages_of_run(folder, first):
    """Run five steps from step `first` on, from a checkpoint if it is not 0."""
    own = Server()
    with called(Run(str(folder), keep=1, callbacks=[own])) as run:
        saved = {"epoch": 0, "step": first, "images": 5, "config": {"batch_size": 1}, "workers": 1}
        options = OPTIONS | {"batch_size": 1}
        run.begin(options, saved if first else None, 5, "auto", START["losses"])
        for step in range(first, 5):
            run.log.record("step", steps=step + 1, epoch=0, step=step, loss=1.0, contrastive=2.0)
    return own.sent


def test_fresh_run_starts_new_id(tmp_path, monkeypatch):
    """A resumed run keeps its id. A restart before the first checkpoint is a fresh run."""
    monkeypatch.setitem(TRACKERS, Server.name, "")
    starts = [messages_of_run(tmp_path, first) for first in (0, 0, 2)]
    assert [sent[0][:2] for sent in starts] == [("start", ""), ("start", ""), ("start", "abc")]
    assert [[steps for steps, *_ in sent[1:-1]] for sent in starts] == [[2, 4, 5], [2, 4, 5], []]


def test_fresh_run_removes_tracker_files(tmp_path):
    """Otherwise a resume with --log-to would continue the old run on the server."""
    for name in TRACKERS:
        (tmp_path / f"{name}.json").write_text("{}")
    with called(Run(str(tmp_path), keep=1)) as run:
        run.begin({"batch_size": 1}, None, 5, "")
    assert not [*tmp_path.glob("*.json")]


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_refused_message_is_one_warning(tmp_path, fails):
    server = Server(fails)
    log = trained(tmp_path, server)
    if fails < 3:
        server.thread.join(60)
        log.record("knn", steps=5, epoch=1, step=0, knn=50.0)
        assert len(warnings(tmp_path)) == 1 and log.callbacks == []
    log.close()
    [line] = warnings(tmp_path)
    assert "ConnectionError: refused; the run continues without this callback" in line
    assert len(server.sent) == fails


def test_silent_server_delays_no_step(tmp_path, monkeypatch):
    """When too many messages wait, it is dropped."""
    monkeypatch.setattr(tracker, "MOST", 2)
    server = Server()
    server.open.clear()
    log = trained(tmp_path, server)
    [line] = warnings(tmp_path)
    assert "Server.record: TimeoutError: 2 messages wait for the server" in line
    log.close()
    server.open.set()
    assert len(warnings(tmp_path)) == 1


def test_silent_server_delays_end_briefly(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "PATIENCE", 0.01)
    server = Server()
    server.open.clear()
    trained(tmp_path, server).close()
    server.open.set()
    [line] = warnings(tmp_path)
    assert "Server.end: TimeoutError: the last numbers were not sent within 0 s" in line


@pytest.mark.parametrize("name", TRACKERS)
def test_missing_package_ends_run_before_folder(images, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    small = ["--image-size", "32", "--batch-size", "8", "--moco-k", "8", "-j", "0"]
    out = ["--out", str(tmp_path / "run"), "--log-to", name]
    fix = f"Run pip install '.[{name}]', or leave the option out"
    assert (
        refused(train, read_config([str(images), *small, *out]))
        == f"--log-to {name}: the package {name} is missing. {fix}"
    )
    assert not (tmp_path / "run").exists()
