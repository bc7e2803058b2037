"""Whole runs of the real commands, and what is told apart in them."""

import contextlib
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

from job.metrics import schema
from job.metrics.log import Log


def write_images(folder):
    """Write 50 training and 9 validation images in two classes, of noise at several sizes; return the folder."""
    generator = np.random.default_rng(0)
    for number in range(59):
        path = folder / ("train" if number < 50 else "val") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (4 + number % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(path)
    return folder


def write_teacher(path, arch="resnet50", **network):
    """Write a teacher with random weights, laid out as MoCo's released files; return the path.

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
    """One `horovodrun -np N python -m job.train` in a process of its own, or another program of this project's."""

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
        """The steps done so far, as metrics.jsonl has them."""
        return [record["steps"] for record in of_kind(self.folder, "step")]

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` steps are done."""
        deadline = time.monotonic() + 240
        while step not in self.steps():
            assert self.process.poll() is None, (
                f"the run ended early:\n{self.process.stdout.read()}"
            )
            assert time.monotonic() < deadline, f"step {step} has not come in 240 s"
            time.sleep(0.02)

    def wait_for_pause(self) -> psutil.Process:
        """Wait until a worker has been stopped by SIGSTOP, and return it."""
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
        """The worker processes."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that has just ended
                if process.cmdline()[1:3] == ["-m", self.program]:
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL the launcher and the workers at once; their loader processes are to end by themselves."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        for process in [psutil.Process(self.process.pid), *self.workers()]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive, f"left behind by killed workers: {alive}"

    def finish(self) -> str:
        """Wait for the end, and return what was printed."""
        output, _ = self.process.communicate(timeout=300)
        return output


# The fields that a clock gives; if a run is repeated, all others of its course have the same values to the last digit.
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
    """The records of a run so far, of its course and of its processes."""
    path = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def records(folder) -> list[dict]:
    """The records of a run's course so far, which are the same in an interrupted and an undisturbed run, without CLOCK."""
    course = [record for record in all_records(folder) if record["kind"] in schema.COURSE]
    return [
        {name: value for name, value in record.items() if name not in CLOCK} for record in course
    ]


def of_kind(folder, kind: str) -> list[dict]:
    """The records of a run that have a kind."""
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
        """The records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    def texts(self, kind):
        """The texts of the records of a kind."""
        return [record["text"] for record in self.of_kind(kind)]


def contents(folder) -> dict:
    """The bytes of each file in a folder, and where each link points, by name."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.iterdir()
        if not path.is_dir()
    }


# As sitecustomize.py: on the second worker a bit of the sixth parameter that is trained, or of the last, flips at the third step.
FLIP = """
import os
if os.environ.get("HOROVOD_RANK") == "1":
    import torch
    step, done = torch.optim.SGD.step, []

    def flipping(self, *arguments, **named):
        step(self, *arguments, **named)
        done.append(0)
        if len(done) == 3:
            self.param_groups[0]["params"][:6][-1].detach().view(-1).view(torch.int32)[0] ^= 1 << 16  # later steps keep it

    torch.optim.SGD.step = flipping
"""

DRIVER = """
import contextlib, importlib, io, json, sys
main, outcomes = importlib.import_module(sys.argv[1]).main, []
for command in json.loads(sys.argv[2]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(command)
        except SystemExit as end:
            code = end.code
    outcomes.append((code, said.getvalue()))
print("\\n" + json.dumps(outcomes))
"""


def errors_of(program: str, commands: list[list]) -> list[str]:
    """The one line that each command line of a program ends with, with exit code 2; one after the other in one process."""
    commands = [[str(argument) for argument in command] for command in commands]
    driver = [sys.executable, "-c", DRIVER, program, json.dumps(commands)]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert [(code, said.count("\n"), said[:7]) for code, said in outcomes] == [
        (2, 1, "error: ")
    ] * len(commands), outcomes
    return [said for _, said in outcomes]


def check_steps(folder, total: int) -> None:
    """Check that metrics.jsonl and TensorBoard have each of `total` steps once, and nothing is purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counted = [record["steps"] for record in of_kind(folder, "step")]
    assert counted == list(range(1, total + 1))
    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step + 1 for event in shown.Scalars("steps/loss")] == counted


def tensors(value, path=""):
    """Yield (path, value) of everything in a checkpoint that a run computes."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from tensors(item, f"{path}/{number}")
    else:
        yield path, value


def differences(first, second, name="last.pth.tar") -> list[str]:
    """The names of what differs, by as little as a bit, between two runs' last checkpoints; their options do not count."""
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
