"""Runs of the real commands, and comparisons of their results."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import torch
from PIL import Image

from job.config import unused_options
from job.declare import differing
from job.engine.run import Run
from job.metrics import schema
from job.metrics.log import Log


def shown_options(config):
    """Return the options that a run of job.train or job.linear shows in its first log lines."""
    run = Run.of("", config)
    options = dataclasses.asdict(config)
    for name in ("config", "out", "resume"):
        del options[name]
    return differing(options, run.defaults, unused_options(config))


def write_images(folder):
    """Write 50 training and 9 validation images of noise in two classes. Return the folder."""
    generator = np.random.default_rng(0)
    for number in range(59):
        path = folder / ("train" if number < 50 else "val") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (4 + number % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(path)
    return folder


def write_teacher(path, arch="resnet50", **network):
    """Write a teacher with random weights in the layout of MoCo's released files. Return the path.

    network: keyword arguments of `build_resnet`.
    """
    from job.cluster import comm
    from job.frameworks.moco import build_moco

    torch.manual_seed(5)
    moco = build_moco(comm, arch, K=64, mlp=True, **network)
    state = {f"module.{key}": value for key, value in moco.state_dict().items()}
    torch.save({"epoch": 200, "arch": arch, "state_dict": state, "optimizer": {}}, path)
    return path


class Job:
    """A process of `horovodrun -np N python -m job.train`, or of another program."""

    def __init__(self, workers: int, folder, arguments: list, program: str = "job.train"):
        self.folder, self.program = folder, program
        python = [sys.executable, "-m", program, *map(str, arguments), "--out", str(folder)]
        launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
        self.process = subprocess.Popen(
            [launcher, "-np", str(workers), *python],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def steps(self) -> list[int]:
        """Return the numbers of the steps recorded in metrics.jsonl so far."""
        return [record["steps"] for record in of_kind(self.folder, "step")]

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` steps are recorded."""
        deadline = time.monotonic() + 240
        while step not in self.steps():
            assert self.process.poll() is None, (
                f"the run ended early:\n{self.process.stdout.read()}"
            )
            assert time.monotonic() < deadline, f"waited 240 s for step {step}"
            time.sleep(0.02)

    def wait_for_pause(self) -> psutil.Process:
        """Wait until SIGSTOP has stopped a worker, and return that worker."""
        while True:
            assert self.process.poll() is None, (
                f"the run ended early:\n{self.process.stdout.read()}"
            )
            for worker in self.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if worker.status() == psutil.STATUS_STOPPED:
                        return worker
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes."""
        workers = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if process.cmdline()[1:3] == ["-m", self.program]:
                    workers.append(process)
        return workers

    def kill(self) -> None:
        """SIGKILL the launcher and all workers, and assert that their loader processes end too."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        for process in [psutil.Process(self.process.pid), *self.workers()]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive, f"left behind by killed workers: {alive}"

    def finish(self) -> str:
        """Wait for the end and return the output."""
        output, _ = self.process.communicate(timeout=300)
        return output


# The fields that hold times. A repeated run has the same values in all other fields.
CLOCK = {
    "images_per_s",
    "data_wait",
    "knn_seconds",
    "val_seconds",
    "measuring",
    "gathering",
    "solving",
}


def all_records(folder) -> list[dict]:
    """Return all records of a run so far, of its course and of its processes."""
    path = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def records(folder) -> list[dict]:
    """Return the records of a run's course so far, without the fields of CLOCK.

    An interrupted run and an uninterrupted one have the same.
    """
    course = [record for record in all_records(folder) if record["kind"] in schema.COURSE]
    return [
        {name: value for name, value in record.items() if name not in CLOCK} for record in course
    ]


def of_kind(folder, kind: str) -> list[dict]:
    """Return the records of one kind of a run."""
    return [record for record in all_records(folder) if record["kind"] == kind]


class Kept(Log):
    """A log that keeps its lines and records."""

    def __init__(self):
        super().__init__(speaks=True)
        self.lines, self.records = [], []

    def line(self, text):
        assert "\n" not in text
        self.lines.append(text)

    def record(self, kind, line="", /, **fields):
        if line:
            self.line(line)
        self.records.append({"kind": kind, **fields})

    def progress(self, *_):
        pass

    def of_kind(self, kind):
        """Return the records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def texts(self, kind):
        """Return the texts of the records of one kind."""
        return [record["text"] for record in self.of_kind(kind)]


def contents(folder) -> dict:
    """Return the bytes of each file and the target of each link in a folder, by name."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.iterdir()
        if not path.is_dir()
    }


# For sitecustomize.py: after the third step, flip a bit of the sixth trained parameter, or of the
# last if there are fewer, on the second worker. The change survives the later steps.
FLIP = """
import os
if os.environ.get("HOROVOD_RANK") == "1":
    import torch
    step, done = torch.optim.SGD.step, []

    def flipping(self, *arguments, **named):
        step(self, *arguments, **named)
        done.append(0)
        if len(done) == 3:
            value = self.param_groups[0]["params"][:6][-1]
            value.detach().view(-1).view(torch.int32)[0] ^= 1 << 16

    torch.optim.SGD.step = flipping
"""

DRIVER = """
import contextlib, importlib, io, json, sys
main, outcomes = importlib.import_module(sys.argv[1]).main, []
for command in json.loads(sys.argv[2]):
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(command)
        except SystemExit as end:
            code = end.code
    outcomes.append((code, errors.getvalue()))
print("\\n" + json.dumps(outcomes))
"""


def errors_of(program: str, commands: list[list]) -> list[str]:
    """Run command lines of a program in one process. Return the error line of each.

    Each must end with exit code 2 and one line.
    """
    commands = [[str(argument) for argument in command] for command in commands]
    driver = [sys.executable, "-c", DRIVER, program, json.dumps(commands)]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    ends = [(code, text.count("\n"), text[:7]) for code, text in outcomes]
    assert ends == [(2, 1, "error: ")] * len(commands), outcomes
    return [text for _, text in outcomes]


def check_steps(folder, total: int) -> None:
    """Assert that metrics.jsonl and TensorBoard have each of `total` steps once: none purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counted = [record["steps"] for record in of_kind(folder, "step")]
    assert counted == list(range(1, total + 1))
    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step + 1 for event in shown.Scalars("steps/loss")] == counted


def tensors(value, path=""):
    """Yield (path, value) of each value in a checkpoint."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from tensors(item, f"{path}/{number}")
    else:
        yield path, value


def differences(first, second, name="last.pth.tar") -> list[str]:
    """Return the names of the values whose bytes differ between two runs' last checkpoints.

    The saved options are not compared.
    """
    contents = [
        torch.load(folder / name, map_location="cpu", weights_only=True)
        for folder in (first, second)
    ]
    one, other = (
        {path: value for path, value in tensors(content) if not path.startswith("/config")}
        for content in contents
    )
    assert len(one) > 100 and (contents[0]["epoch"], contents[0].get("step", 0)) > (0, 0)
    same = {path for path in one.keys() & other.keys() if same_bytes(one[path], other[path])}
    return sorted((one.keys() | other.keys()) - same)


def same_bytes(one, other) -> bool:
    if torch.is_tensor(one):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.numpy().tobytes() == other.numpy().tobytes()
        )
    return one == other
