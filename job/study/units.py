"""How a unit becomes a record: its commands, run one after the other, and what they leave in its folder."""

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
from job.study.plan import Plan, Unit, words

DEFAULTS = {"job.train": Config(), "job.linear": LinearConfig()}


class Stopped(Exception):
    """A signal has come, or another unit has failed."""


@dataclasses.dataclass
class Bench:
    """Where units are trained: the study's folder, and the commands that are running there.

    data: {set: a word for its images}.
    """

    plan: Plan
    out: Path
    data: dict[str, str]

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.RLock()  # a signal may come while `stop` is at work
        self.teachers = {unit.set: unit for unit in self.plan.units if unit.arm == TEACHER}

    def folder(self, unit: Unit) -> Path:
        """Where a unit's runs, output and record are."""
        return self.out / unit.name

    def identity(self, unit: Unit) -> dict[str, Any]:
        """All that a unit's results follow from: resolved options, images, kind of device, its teacher."""
        found: dict[str, Any] = unit.resolved() | {
            "images": self.data[unit.set],
            "device": self.plan.device,
        }
        if unit.guided:
            teacher = json.dumps(self.identity(self.teachers[unit.set]), sort_keys=True)
            found["teacher"] = hashlib.sha256(teacher.encode()).hexdigest()[:16]
        return found

    def commands(self, unit: Unit) -> dict[str, list[str]]:
        """A unit's commands: {what it tells: its words}."""
        data, folder = str(self.out / self.plan.images(unit.set)), self.folder(unit)
        train = [
            "job.train",
            data,
            *words({"knn_every": unit.resolved()["job.train"]["epochs"]} | unit.train),
        ]
        if unit.guided:
            train += ["--teacher", f"{self.folder(self.teachers[unit.set])}/train/last.pth.tar"]
        linear = [
            "job.linear",
            data,
            *words(unit.linear),
            "--pretrained",
            f"{folder}/train/last.pth.tar",
        ]
        return {
            "train": [*train, "--out", f"{folder}/train", "--resume", "auto"],
            "linear": [*linear, "--out", f"{folder}/linear", "--resume", "auto"],
        }

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """The record of a unit that was measured, or None. RunError: it is damaged, or of another unit under this name."""
        path = self.folder(unit) / "record.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            old, new = found["identity"], json.loads(json.dumps(self.identity(unit)))
            for program, default in DEFAULTS.items():  # options of a newer version had theirs
                missing = set(new[program]) - set(old[program])
                old[program] |= {name: getattr(default, name) for name in missing}
            measured = found["measured"]
            if measured:
                (
                    float(found["knn"]),
                    float(found["linear"]),
                    float(found["seconds"]),
                    found["commands"],
                    found["on"],
                )
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({error}): remove {path.parent}, which is then trained anew"
            ) from None
        if old != new:
            raise RunError(
                f"{path} is of another {unit.name}: {difference(old, new)}; choose another --out, or remove {path.parent}, "
                "which is then trained anew"
            )
        return found if measured else None

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Train a unit from where it was left, measure it and write its record. RunError: a command fails. Stopped: so it was.

        The record is begun before the training, so that what is left of it is not gone on with under other options.
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
            "seconds": round(sum(one["seconds"] for one in tries), 1),  # of all tries
            "tries": len(tries),
            "measured": time.strftime("%Y-%m-%d"),
            "on": circumstances(self.plan.device),
        }
        write_whole(str(folder / "record.json"), (json.dumps(record, indent=1) + "\n").encode())
        return record

    def run(self, step: str, command: list[str], folder: Path) -> None:
        """Run a command to its end. Stopped, or RunError, with the error's own line: it did not end."""
        output = folder / "output.txt"
        with open(output, "ab") as file:
            start = file.tell()
            begun = time.monotonic()
            with self.lock:
                if self.stopping.is_set():
                    raise Stopped
                process = subprocess.Popen(
                    [sys.executable, "-m", *command], env=self.environment(), stdin=subprocess.PIPE, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self.running.add(process)
            process.wait()
            with self.lock:
                self.running.discard(process)
        with open(folder / "tries.jsonl", "a") as file:
            file.write(
                json.dumps(
                    {
                        "step": step,
                        "seconds": round(time.monotonic() - begun, 1),
                        "code": process.returncode,
                    }
                )
                + "\n"
            )
        if process.returncode or not (folder / step / "complete").exists():
            if self.stopping.is_set():
                raise Stopped
            said = output.read_bytes()[start:].decode(errors="backslashreplace")
            lines = (
                [line for line in said.splitlines() if "error: " in line]
                or said.splitlines()[-1:]
                or ["it said nothing"]
            )
            raise RunError(
                f"{self.shown(command)} ended with {process.returncode}: {lines[-1].strip()}; all it said is in {output}"
            )

    def environment(self) -> dict[str, str]:
        """This process's, in which a command ends when this process does, and sees a GPU where the form wants one.

        Networks that train at once share the cores: threads of several that wait for each other on one core take it in vain.
        """
        threads = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.plan.at_once))
        }
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.plan.device == "cpu" else {}
        return threads | dict(os.environ) | hidden | {"MGD_LIFELINE": "stdin"}

    def shown(self, command: list[str]) -> str:
        """A command as a person would type it."""
        hidden = "CUDA_VISIBLE_DEVICES= " if self.plan.device == "cpu" else ""
        return hidden + shlex.join(["python", "-m", *command])

    def stop(self) -> None:
        """Let what is running save and end, and start nothing more."""
        self.stopping.set()
        with self.lock:
            for process in self.running:
                process.send_signal(signal.SIGUSR2)


def accuracies(folder: Path) -> dict[str, float]:
    """Return a unit's accuracies in percent, its AUC, times, ratios of losses and factors.

    The AUC is that of job/metrics/collapse.py. The ratios are the distillation loss over the
    framework's in the first and in the last epoch.
    The ratio only if the framework has a loss; the factor only if it was measured for --loss-share,
    with the distiller's name if there are several. The time is the median over steps, in seconds,
    if they have a speed.
    """
    history = read_run(folder / "train")
    steps, knn = history.steps, history.knn[-1]
    found = {"knn": round(knn["knn"], 2)}
    if "knn_auc" in knn:  # runs of earlier versions lack it
        found["knn_auc"] = round(knn["knn_auc"], 4)
    if "images_per_s" in steps:
        seconds = history.options["batch_size"] / np.nanmedian(steps["images_per_s"])
        found["step_seconds"] = float(f"{seconds:.4g}")
    for name, epoch in (("pull_first", steps["epoch"][0]), ("pull_last", steps["epoch"][-1])):
        of = steps["epoch"] == epoch
        means = {loss: steps[loss][of].mean() for loss in [*history.losses, "distillation"]}
        if own := own_size(means, history.losses):
            found[name] = round(float(means["distillation"] / own), 4)
    for record in history.factors:
        name = "loss_factor" if len(history.factors) == 1 else f"loss_factor_{record['distiller']}"
        found[name] = record["loss_factor"]
    return found | {"linear": round(read_run(folder / "linear").validation[-1]["val_top1"], 2)}


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """In words, the first thing in which two identities differ."""
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict) and before != now:
            return difference(before, now, f"{path}{name} ")
        if before != now:
            return f"{path}{name} was {before}, now {now}"
    return "nothing differs"


def circumstances(device: str) -> str:
    """Processor, cores, memory, the GPU of a `device` gpu, and the versions that count."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    gpus = [torch.cuda.get_device_name()] if device == "gpu" else []
    machine = [model[1] if model else platform.machine(), f"{psutil.cpu_count()} cores", *gpus]
    machine.append(f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory")
    versions = [
        f"{package} {importlib.metadata.version(package)}" for package in ("torch", "torchvision")
    ]
    return f"{', '.join(machine)}, with {', '.join(versions)}"
