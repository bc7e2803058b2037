"""Callbacks: the records that they receive, their failures, and --log-to."""

import json
import sys
from types import ModuleType

import pytest

from errors import refused
from job.config import Config, LinearConfig, read_config
from job.errors import RunError
from job.metrics.callbacks import Callback, load
from job.metrics.log import Log


class Recorder(Callback):
    """Keep all received calls, and fail in one method."""

    def __init__(self, fails="", error=None):
        self.fails, self.error, self.received = fails, error or OSError("no server"), []

    def receive(self, method, *arguments):
        self.received.append((method, *arguments))
        if method == self.fails:
            raise self.error

    def begin(self, options, folder):
        self.receive("begin", options, folder)

    def record(self, record):
        self.receive("record", record)
        record.clear()  # its own copy

    def end(self, how):
        self.receive("end", how)

    @property
    def records(self):
        return [arguments[0] for method, *arguments in self.received if method == "record"]


class Copying(Recorder):
    """Keep copies, because `record` clears its argument."""

    def receive(self, method, *arguments):
        super().receive(method, *(json.loads(json.dumps(each)) for each in arguments))


def trained(folder, callbacks, start=(0, 0), steps=4, end=True):
    """Record a short run."""
    log = Log(True)
    log.remark("hint", "unlabelled", "no labels")
    log.open(str(folder), start, {"arch": "resnet18", "log_to": []}, callbacks)
    for step in range(start[1], steps):
        log.record("step", steps=step + 1, epoch=0, step=step, loss=1 / (step + 1), sizes=(1, 2))
    if end:
        log.record("end", "done", how="complete", text="done", code=0)
    log.close()
    return log


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_callback_receives_lines_of_file(tmp_path):
    callback = Copying()
    trained(tmp_path, [callback])
    assert callback.received[0] == ("begin", {"arch": "resnet18", "log_to": []}, str(tmp_path))
    assert callback.records == lines(tmp_path) and len(callback.records) == 6
    assert callback.received[-1] == ("end", "complete")


def test_callback_receives_records_of_resume(tmp_path):
    first, second = Copying(), Copying()
    trained(tmp_path, [first], end=False)
    trained(tmp_path, [second], start=(0, 2))
    assert first.received[-1] == ("end", "error")  # no record has the cause
    assert [method for method, *_ in second.received[:1]] == ["begin"]
    assert lines(tmp_path) == first.records[:3] + second.records
    assert [record.get("steps") for record in second.records] == [None, 3, 4, None]


def test_callback_is_not_ended_without_begin(tmp_path):
    callback = Copying()
    Log(True).close()
    assert callback.received == []


@pytest.mark.parametrize(("fails", "calls"), [("begin", 1), ("record", 2), ("end", 8)])
def test_failing_callback_is_dropped(tmp_path, capsys, fails, calls):
    """One warning names it. The others receive all records, including the warning."""
    bad, good = Copying(fails), Copying()
    log = trained(tmp_path, [bad, good])
    text = f"Copying.{fails}: OSError: no server; the run continues without this callback"
    [warning] = [record for record in lines(tmp_path) if record["kind"] == "warning"]
    assert (warning["id"], warning["text"]) == ("callback", text)
    assert capsys.readouterr().out.count(text) == 1
    assert len(bad.received) == calls and log.callbacks == []
    records = lines(tmp_path)
    assert good.records == (records[:-1] if fails == "end" else records)
    assert good.received[-1] == ("end", "complete")


def test_all_callbacks_may_fail(tmp_path):
    trained(tmp_path, [Copying("record"), Copying("record"), Copying("begin")])
    assert [record["kind"] for record in lines(tmp_path)].count("warning") == 3
    assert [record["kind"] for record in lines(tmp_path)].count("step") == 4


def test_callback_can_stop_run(tmp_path):
    interrupts = []
    log = Log(True, lambda: interrupts.append(len(callback.received)))
    callback = Recorder("record", KeyboardInterrupt())
    log.open(str(tmp_path), (0, 0), {}, [callback])
    log.record("step", steps=1, epoch=0, step=0)
    log.record("step", steps=2, epoch=0, step=1)
    log.close()
    assert interrupts == [2, 3] and len(callback.received) == 4


def test_newest_has_last_numbers(tmp_path):
    trained(tmp_path, [])
    log = Log(True)
    log.open(str(tmp_path), (0, 4))
    assert log.newest() == {"steps": 4, "loss": 0.25}
    log.record("knn", steps=4, epoch=1, step=0, knn=50.0)
    log.record("step", steps=5, epoch=1, step=0, loss=0.125)
    assert log.newest() == {"steps": 5, "loss": 0.125, "knn": 50.0}
    log.close()


# --log-to.


@pytest.fixture
def module(monkeypatch):
    """A user's module with callbacks and other objects."""
    made = ModuleType("mine")
    made.Recorder, made.make, made.number = Recorder, lambda: Recorder("end"), 3
    made.nothing = lambda: None

    def refuse():
        raise ValueError("no key")

    made.refuse = refuse
    monkeypatch.setitem(sys.modules, "mine", made)


def test_load_makes_callback_of_user(module):
    given = Recorder()
    first, second, third = load(["mine:Recorder", "mine:make"], [given])
    assert (first.fails, second.fails) == ("", "end") and third is given
    assert load([]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:absent", "mine:absent: .*'absent'; expected module:name of a function without"),
        ("nowhere:make", "nowhere:make: No module named 'nowhere'; expected"),
        ("mine:number", "mine:number: 'int' object is not callable; expected"),
        ("mine:refuse", "mine:refuse: no key; expected"),
        ("mine:nothing", "mine:nothing: NoneType has no method 'begin'; expected a callback"),
    ],
)
def test_load_refuses_invalid_callbacks(module, name, message):
    with pytest.raises(RunError, match=f"^--log-to {message}") as caught:
        load([name])
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["", "mlfow", ":", "module:", ":name", "module.name"])
@pytest.mark.parametrize("program", [("job.train", Config), ("job.linear", LinearConfig)])
def test_log_to_refuses_other_form(program, name):
    """The programs read their options before they make a folder."""
    message = refused(read_config, ["DIR", f"--log-to={name}"], *program)
    assert message.startswith(f"--log-to '{name}': expected wandb, mlflow or module:")
    assert message.endswith("did you mean mlflow?") == (name == "mlfow")


def test_load_finds_module_in_current_folder(tmp_path, monkeypatch):
    """Console scripts do not have the current folder on the path."""
    (tmp_path / "beside_me.py").write_text("from job.metrics.callbacks import Callback as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    assert len(load(["beside_me:make"])) == 1
    sys.modules.pop("beside_me")


def test_load_refuses_object_without_methods():
    with pytest.raises(RunError, match="^callback 2: builtin.* has no method 'begin'; expected"):
        load([], [Recorder(), print])
