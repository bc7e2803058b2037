"""Run a unit's commands, and write its record from the files of its runs."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from job.config import Config, LinearConfig
from job.errors import RunError
from job.files import write_whole
from job.metrics.schema import own_size
from job.show.read.history import read_run
from job.study.form import TEACHER
from job.study.plan import Plan, Unit, arguments

DEFAULTS = {"job.train": Config(), "job.linear": LinearConfig()}


class Stopped(Exception):
    """The study stops because of a signal, or because another unit has failed."""


@dataclasses.dataclass
class Bench:
    """The study's folder and the commands that run there.

    data: {set: digest of its images}.
    """

    plan: Plan
    out: Path
    data: dict[str, str]

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.RLock()  # reentrant: a signal can interrupt `stop`
        self.teachers = {unit.set: unit for unit in self.plan.units if unit.arm == TEACHER}

    def folder(self, unit: Unit) -> Path:
        """Return the folder of a unit's runs, output and record."""
        return self.out / unit.name

    def identity(self, unit: Unit) -> dict[str, Any]:
        """Return everything on which a unit's results depend.

        It has the resolved options, the images' digest, the device and the teacher's digest.
        """
        identity: dict[str, Any] = unit.resolved() | {
            "images": self.data[unit.set],
            "device": self.plan.device,
        }
        if unit.guided:
            teacher = json.dumps(self.identity(self.teachers[unit.set]), sort_keys=True)
            identity["teacher"] = hashlib.sha256(teacher.encode()).hexdigest()[:16]
        return identity

    def commands(self, unit: Unit) -> dict[str, list[str]]:
        """Return a unit's commands: {folder of its run: module and arguments}."""
        data, folder = str(self.out / self.plan.images(unit.set)), self.folder(unit)
        train = [
            "job.train",
            data,
            *arguments({"knn_every": unit.resolved()["job.train"]["epochs"]} | unit.train),
        ]
        if unit.guided:
            train += ["--teacher", f"{self.folder(self.teachers[unit.set])}/train/last.pth.tar"]
        linear = [
            "job.linear",
            data,
            *arguments(unit.linear),
            "--pretrained",
            f"{folder}/train/last.pth.tar",
        ]
        return {
            "train": [*train, "--out", f"{folder}/train", "--resume", "auto"],
            "linear": [*linear, "--out", f"{folder}/linear", "--resume", "auto"],
        }

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """Return the record of a measured unit, or None.

        RunError: the record is damaged, or of another unit of this name.
        """
        path = self.folder(unit) / "record.json"
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            old, new = record["identity"], json.loads(json.dumps(self.identity(unit)))
            for program, default in DEFAULTS.items():  # options that are newer than the record
                missing = set(new[program]) - set(old[program])
                old[program] |= {name: getattr(default, name) for name in missing}
            measured = record["measured"]
            if measured:
                (
                    float(record["knn"]),
                    float(record["linear"]),
                    float(record["seconds"]),
                    record["commands"],
                    record["on"],
                )
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path}: damaged ({error}); expected a record. "
                f"Remove {path.parent} to train it again"
            ) from None
        if old != new:
            raise RunError(
                f"{path}: of another {unit.name}: {difference(old, new)}; "
                "expected the same options, images and teacher. "
                f"Choose another --out, or remove {path.parent} to train it again"
            )
        return record if measured else None

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Train a unit or resume it, measure it and write its record.

        An unfinished record is written before the training. So the unit cannot be resumed with
        other options. RunError: a command fails. Stopped: the study stops.
        """
        folder = self.folder(unit)
        folder.mkdir(parents=True, exist_ok=True)
        commands = self.commands(unit)
        record = {
            "unit": unit.name,
            "set": unit.set,
            "arm": unit.arm,
            "seed": unit.seed,
            "measured": False,
        }
        record |= {
            "identity": self.identity(unit),
            "commands": [self.shown(command) for command in commands.values()],
        }
        write_whole(str(folder / "record.json"), (json.dumps(record, indent=1) + "\n").encode())
        for step, command in commands.items():
            self.run(step, command, folder)
        tries = [
            json.loads(line)
            for line in (folder / "tries.jsonl").read_text().splitlines()
            if line.endswith("}")
        ]
        record |= accuracies(folder) | {
            "seconds": round(sum(each["seconds"] for each in tries), 1),
            "tries": len(tries),
            "measured": time.strftime("%Y-%m-%d"),
            "on": circumstances(self.plan.device),
        }
        write_whole(str(folder / "record.json"), (json.dumps(record, indent=1) + "\n").encode())
        return record

    def run(self, step: str, command: list[str], folder: Path) -> None:
        """Run a command to its end, with its output in `folder`.

        RunError, with its last error line: the command fails. Stopped: the study stops.
        """
        output = folder / "output.txt"
        with open(output, "ab") as file:
            offset = file.tell()
            start = time.monotonic()
            with self.lock:
                if self.stopping.is_set():
                    raise Stopped
                process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    env=self.environment(),
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self.running.add(process)
            process.wait()
            with self.lock:
                self.running.discard(process)
        with open(folder / "tries.jsonl", "a") as file:
            file.write(
                json.dumps(
                    {
                        "step": step,
                        "seconds": round(time.monotonic() - start, 1),
                        "code": process.returncode,
                    }
                )
                + "\n"
            )
        if process.returncode or not (folder / step / "complete").exists():
            if self.stopping.is_set():
                raise Stopped
            text = output.read_bytes()[offset:].decode(errors="backslashreplace")
            lines = (
                [line for line in text.splitlines() if "error: " in line]
                or text.splitlines()[-1:]
                or ["no output"]
            )
            raise RunError(
                f"{self.shown(command)}: exit code {process.returncode}: {lines[-1].strip()}. "
                f"See {output}"
            )

    def environment(self) -> dict[str, str]:
        """Return this process's environment, changed for a command.

        The command ends if this process does. It sees a GPU only if the form's device is gpu.
        Concurrent networks have separate cores: threads that wait on a shared core waste it.
        """
        threads = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.plan.at_once))
        }
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.plan.device == "cpu" else {}
        return threads | dict(os.environ) | hidden | {"MGD_LIFELINE": "stdin"}

    def shown(self, command: list[str]) -> str:
        """Return a command as a user types it."""
        hidden = "CUDA_VISIBLE_DEVICES= " if self.plan.device == "cpu" else ""
        return hidden + shlex.join(["python", "-m", *command])

    def stop(self) -> None:
        """Make running commands save and end, and start no more."""
        self.stopping.set()
        with self.lock:
            for process in self.running:
                process.send_signal(signal.SIGUSR2)


def accuracies(folder: Path) -> dict[str, float]:
    """Return the values of a unit's record that come from its runs.

    knn, linear: accuracies in percent. knn_auc: the AUC of job/metrics/collapse.py.
    step_seconds: the median over steps, if they have a speed.
    pull_first, pull_last: the distillation loss divided by the framework's, in the first and last
    epoch, if the framework has a loss. loss_factor: if it was computed from --loss-share, with the
    distiller's name if there are several.
    """
    history = read_run(folder / "train")
    steps, knn = history.steps, history.knn[-1]
    values = {"knn": round(knn["knn"], 2)}
    if "knn_auc" in knn:  # runs of earlier versions lack it
        values["knn_auc"] = round(knn["knn_auc"], 4)
    if "images_per_s" in steps:
        seconds = history.options["batch_size"] / np.nanmedian(steps["images_per_s"])
        values["step_seconds"] = float(f"{seconds:.4g}")
    for name, epoch in (("pull_first", steps["epoch"][0]), ("pull_last", steps["epoch"][-1])):
        mask = steps["epoch"] == epoch
        means = {loss: steps[loss][mask].mean() for loss in [*history.losses, "distillation"]}
        if own := own_size(means, history.losses):
            values[name] = round(float(means["distillation"] / own), 4)
    for record in history.factors:
        name = "loss_factor" if len(history.factors) == 1 else f"loss_factor_{record['distiller']}"
        values[name] = record["loss_factor"]
    return values | {"linear": round(read_run(folder / "linear").validation[-1]["val_top1"], 2)}


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """Return a text with the first difference between two identities."""
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict) and before != now:
            return difference(before, now, f"{path}{name} ")
        if before != now:
            return f"{path}{name} was {before}, now {now}"
    return "nothing differs"


def circumstances(device: str) -> str:
    """Return processor, cores, GPU (if `device` is gpu), memory and versions as a text."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    gpus = [torch.cuda.get_device_name()] if device == "gpu" else []
    machine = [model[1] if model else platform.machine(), f"{psutil.cpu_count()} cores", *gpus]
    machine.append(f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory")
    versions = [
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "torchvision")
    ]
    return f"{', '.join(machine)}, with {', '.join(versions)}"
