"""The packages of Weights & Biases and MLflow, without a network."""

import json
import signal
import struct
import sys

import pytest

from job.metrics.callbacks import load
from job.metrics.log import Log

pytestmark = pytest.mark.slow

OPTIONS = {"print_freq": 2, "arch": "resnet18", "teacher": "", "mgd_stages": [1, 2], "lr": 0.03}
START = {"epoch": 0, "step": 0, "steps_an_epoch": 5, "losses": ["contrastive"]}
LOSSES = [1.0, 0.5, 0.25, float("nan"), 0.0625]


def trained(folder, name, first, last, how, **options):
    """Record some steps like a process of a run with a tracker."""
    folder.mkdir(exist_ok=True)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    streams = (sys.stdout, sys.stderr, sys.excepthook)
    log = Log(True)
    log.open(str(folder), (0, first), OPTIONS | options, load([name]))
    log.record("start", **START | {"step": first})
    for step in range(first, last):
        numbers = {"loss": LOSSES[step], "contrastive": 2.0, "distillation": 1.0}
        log.record("step", steps=step + 1, epoch=0, step=step, **numbers)
    log.record("end", how=how, text="", code=0)
    log.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (sys.stdout, sys.stderr, sys.excepthook) == streams


def warnings(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["text"] for record in records if record["kind"] == "warning"]


BLOCK, HEADER = 2**15, 7  # bytes in LevelDB's log format. The file has a header of the same size.


def messages(path):
    """Yield the messages of a file of Weights & Biases, in LevelDB's log format."""
    content, offset, message = path.read_bytes(), HEADER, b""
    while offset + HEADER <= len(content):
        if BLOCK - offset % BLOCK < HEADER:
            offset += BLOCK - offset % BLOCK
            continue
        length, type = struct.unpack_from("<HB", content, offset + 4)
        offset += HEADER + length
        message += content[offset - length : offset]
        if type in (1, 4):  # a complete message, or the last piece of one
            yield message
            message = b""


def saved_by_wandb(path):
    """Return the run, its numbers and its exit code in the file of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    numbers = []
    for content in messages(path):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
            numbers.append({tag: json.loads(item.value_json) for tag, item in items.items()})
        if record.HasField("exit"):
            code = record.exit.exit_code
    return run, numbers, code


@pytest.fixture
def wandb():
    """The package. It reads its environment variables once."""
    wandb = pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    yield wandb
    wandb.teardown()


def test_wandb_resumes_its_run(wandb, tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "mine"
    trained(folder, "wandb", 0, 4, "stopped")
    trained(folder, "wandb", 3, 5, "error", lr=0.1)
    wandb.teardown()  # waits until its service has written everything
    actual = [saved_by_wandb(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
    id = json.loads((folder / "wandb.json").read_text())["id"]
    assert [run.run_id for run, _, _ in actual] == [id, id]
    assert {(run.project, run.display_name) for run, _, _ in actual} == {("moco-mgd", "mine")}
    (_, first, _), (_, second, _) = actual
    assert [each["steps"] for each in first + second] == [2, 4, 5]
    assert (first[0]["steps/loss"], second[0]["steps/loss"]) == (0.5, 0.0625)
    assert first[0]["steps/ratio"] == 0.5
    assert [code for _, _, code in actual] == [0, 1] and warnings(folder) == []


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
@pytest.mark.short
def test_mlflow_resumes_its_run(tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow", reason="pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder, client = tmp_path / "mine", mlflow.MlflowClient(store.format(tmp_path))
    trained(folder, "mlflow", 0, 4, "stopped")
    assert warnings(folder) == []
    id = json.loads((folder / "mlflow.json").read_text())["id"]
    assert client.get_run(id).info.status == "KILLED"
    trained(folder, "mlflow", 3, 5, "complete", lr=0.1)
    assert warnings(folder) == []
    run = client.get_run(id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert client.get_experiment(run.info.experiment_id).name == "moco-mgd"
    assert run.data.params == {name: str(value) for name, value in OPTIONS.items()}
    losses = client.get_metric_history(id, "steps/loss")
    finite = sorted((each.step, each.value) for each in losses if each.step != 4)
    assert finite == [(2, 0.5), (5, 0.0625)] and len(losses) == 3
    assert run.data.metrics["steps/ratio"] == 0.5


REFUSING = {  # a closed port
    "wandb": {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": 40 * "0",
        "WANDB_INIT_TIMEOUT": "1",  # s
    },
    "mlflow": {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    },
}


@pytest.mark.parametrize("name", REFUSING)
def test_unreachable_server_is_one_warning(wandb, tmp_path, monkeypatch, name):
    pytest.importorskip(name, reason=f"pip install '.[{name}]'")
    for variable, value in REFUSING[name].items():
        monkeypatch.setenv(variable, value)
    for variable in ("WANDB_MODE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    trained(tmp_path / "mine", name, 0, 5, "complete")
    [line] = warnings(tmp_path / "mine")
    assert line.endswith("; the run continues without this callback")
