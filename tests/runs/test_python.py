"""Runs from Python code: scripts and notebooks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import process
import pytest
from nbclient import NotebookClient

from runs import all_records, differences, of_kind

ROOT = Path(__file__).parents[2]

SUPPORT = os.path.dirname(process.__file__)
OPTIONS = dict(arch="resnet18", stem="small", width=16, image_size=16, batch_size=8, epochs=2)
OPTIONS |= dict(moco_k=16, moco_dim=8, mlp=True, workers=1, lr=0.01)
ARGUMENTS = "-a resnet18 --stem small --width 16 --image-size 16 --batch-size 8 --epochs 2".split()
ARGUMENTS += "--moco-k 16 --moco-dim 8 --mlp -j 1 --lr 0.01".split()

# It has no guard of `__main__`: loader processes must not import the script.
SCRIPT = f"""
import re, sys, warnings
sys.path.append({SUPPORT!r})
from process import different, state
initial = state()
from job.config import Config, LinearConfig
from job.embed import EmbedConfig, embed
from job.errors import RunError
from job.linear import linear
from job.metrics.callbacks import Callback
from job.train import train

# torch sets a variable, and packages that it imports filter warnings.
assert different(initial, state()).keys() <= {{"variables", "filters"}}
assert not [rule for rule in warnings.filters if re.match(rule[3] or "-", "PIL.Image")]
print("begin")
before = state()
options = {OPTIONS!r}
images, out = sys.argv[1:]
"""
TWICE = """
class Broken(Callback):
    def record(self, record):
        raise OSError("no server")

calls = {"one": [], "two": [Broken()]}
runs = [train(Config(data=images, out=f"{out}/{name}", **options), calls[name]) for name in calls]
assert not different(before, state())
try:
    train(Config(data=images, out=f"{out}/one", **options))
except RunError as error:
    assert "holds a run already" in str(error)
assert not different(before, state())
assert runs[0].numbers["loss"] == runs[1].numbers["loss"] and runs[0].numbers["steps"] == 12
options = dict(pretrained=runs[0].checkpoint, data=images, batch_size=8, workers=1)
features = f"{out}/features.npy"
assert embed(EmbedConfig(data=images, pretrained=runs[0].checkpoint, out=features)) == features
knn = linear(LinearConfig(knn=True, **options))
line = linear(LinearConfig(epochs=1, schedule=[], lr=0.1, out=f"{out}/linear", **options))
assert not different(before, state())
print("end", [run.folder for run in runs], sorted(knn.numbers), line.numbers["val_top1"] >= 0)
"""


def python(script, *arguments):
    """Run a script, given as code or as a path. Return its output and its standard error."""
    start = ["-c", script] if "\n" in str(script) else [script]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    """The folder of the command's run."""
    folder = tmp_path_factory.mktemp("command") / "run"
    command = [sys.executable, "-m", "job.train", images, *ARGUMENTS, "--out", folder]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return folder


def test_script_runs_all_programs(images, reference, tmp_path):
    """Training gives the command's bytes. The output has the script's own lines in order."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + TWICE)
    done = python(script, images, tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], sum(line.startswith("done:") for line in lines)) == ("begin", 3)
    names = ["knn", "knn_auc", "knn_images", "knn_k"]
    folders = [f"{tmp_path}/{name}" for name in ("one", "two")]
    assert lines[-1] == f"end {folders} {names} True"
    assert done.stdout.count("warning: Broken.record: OSError: no server; the run continues") == 1
    assert (
        differences(reference, tmp_path / "one") == differences(reference, tmp_path / "two") == []
    )


NOTEBOOK = """
import asyncio, json, os, signal, threading

class Watch(Callback):
    def __init__(self, stop=lambda: None):
        self.stop, self.records = stop, []

    def record(self, record):
        self.records.append(record)
        if record["kind"] == "step" and record["steps"] == 8:
            self.stop()

    def end(self, how):
        self.how = how

def interrupt():
    raise KeyboardInterrupt

def cell(name, stop):
    config = Config(data=images, out=f"{out}/{name}", resume="auto", **options)
    first, second = Watch(stop), Watch()
    try:
        train(config, [first])
    except KeyboardInterrupt as error:
        print("stopped:", error)
    run = train(config, [second])
    lines = [json.loads(line) for line in open(f"{out}/{name}/metrics.jsonl")]
    assert lines == first.records + second.records
    print("end", name, first.how, second.how, run.numbers["steps"], flush=True)

async def loop():
    cell("loop", lambda: os.kill(os.getpid(), signal.SIGINT))

asyncio.run(loop())
thread = threading.Thread(target=cell, args=("thread", interrupt))
thread.start()
thread.join()
"""


def test_notebook_cell_stops_and_resumes(images, reference, tmp_path):
    """A signal stops the cell in an event loop, a callback the one in a thread."""
    done = python(SCRIPT + NOTEBOOK, images, tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = 'stopped: stopped by a signal; resume="auto" continues from here'
    lines = [line for line in done.stdout.splitlines() if line.startswith(("stopped:", "end"))]
    assert lines == [text, "end loop stopped complete 12", text, "end thread stopped complete 12"]
    assert (
        differences(reference, tmp_path / "loop")
        == differences(reference, tmp_path / "thread")
        == []
    )


README_CELL = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
NEXT_CELL = "print(run.folder, run.numbers['steps'])"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A function that runs cells in a Jupyter kernel. It returns their outputs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def run(*cells):
        notebook = nbformat.v4.new_notebook()
        notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        return [cell.outputs for cell in notebook.cells]

    return run


def test_readme_example_runs_in_jupyter(kernel, tmp_path):
    """The cell's output has all lines, and the kernel runs the next cell."""
    outputs, after = kernel(README_CELL, NEXT_CELL)
    assert {(output.output_type, output.name) for output in outputs} == {("stream", "stdout")}
    lines = "".join(output.text for output in outputs).splitlines()
    run = tmp_path / "runs" / "python"
    records, steps, knn = all_records(run), of_kind(run, "step"), of_kind(run, "knn")
    printed = [line for line in lines if re.fullmatch(r"\w+ (None|[-0-9.e]+)", line)]
    assert printed == [f"{record['kind']} {record.get('loss')}" for record in records]
    last = steps[-1]
    assert lines[-1] == f"runs/python/last.pth.tar {last['loss']} {knn[-1]['knn']}"
    assert (run / "last.pth.tar").exists() and (run / "complete").exists()
    assert [record["epoch"] for record in knn] == [1, 2]
    [output] = after
    assert output.text == f"runs/python {last['steps']}\n"
