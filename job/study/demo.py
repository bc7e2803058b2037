"""Train a teacher, a student without it and a student with it, and compare their features.

While the student with MGD trains, one of its workers is killed, and the run is resumed.

python -m job.study.demo [FOLDER] [--seed N]
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from job.cli import Parser
from job.cluster.exits import reported_errors
from job.declare import expand
from job.errors import RunError
from job.files import write_whole
from job.show.read.history import read_run
from job.show.watch.app import marks_for
from job.study.data import prepare

IMAGES = Path("data/mnist")
MOST = 500  # images of a class
WORKERS = 2
KILL_AT = "epoch 2 step "  # the start of the line at which a worker is killed
RANK = re.compile(r"^\[\d+\]<std(out|err)>:")  # horovodrun's prefix of a worker's line
MARK = "demo"  # a file in the folder: the demo made it and can remove it
BAR = 40  # characters of 100 %
ELSEWHERE = f"Start the demo in another folder: it writes {IMAGES} there"
BIN = Path(sys.executable).parent
END = """
The report of all runs: {folder}/report.html
The student's checkpoint: {folder}/mgd/last.pth.tar

The same with your images and your teacher:

  horovodrun -np 2 python -m job.train DIR -a resnet18 --batch-size 64 --lr 0.0075 --mlp \\
      --moco-t 0.2 --aug-plus --cos --teacher TEACHER.pth.tar --out runs/mine --resume auto"""


class Network(NamedTuple):
    """A network of the demo."""

    name: str  # of its run's folder
    title: str
    options: list[str]  # of job.train


def networks(folder: Path) -> list[Network]:
    """Return the demo's networks, in the order of training."""
    teacher = ["--teacher", f"{folder}/teacher/last.pth.tar"]
    return [
        Network("teacher", "teacher, twice as wide", ["--config", "demo-teacher"]),
        # With a rate of 0 no weight changes. The epoch gives batch norm the images' statistics,
        # without which an untrained network measures worse than it is.
        Network("untrained", "student, untrained", ["--epochs", "1", "--lr", "0"]),
        Network("alone", "student without teacher", []),
        Network("mgd", "student with MGD", [*teacher, "--mgd-images", "512"]),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run `job.study.demo` on the command line's options."""
    parser = Parser(
        prog="job.study.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=expand,
        default="runs/demo",
        help="folder of the runs (default: runs/demo); an earlier demo in it is removed",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of all runs (default: 0)"
    )
    with reported_errors():
        options = parser.parse_args(argv)
        try:
            demo(Path(options.folder), options.seed)
        except KeyboardInterrupt:
            raise RunError("stopped by Ctrl-C. The next demo starts again", 130) from None


def demo(folder: Path, seed: int) -> None:
    """Train and measure the networks, and compare them. RunError: a command fails."""
    start = time.monotonic()
    clear(folder)
    prepare("mnist", IMAGES, MOST, say, fix=ELSEWHERE)
    listed = networks(folder)
    for number, network in enumerate(listed, 1):
        heading(f"{number}/{len(listed)} The {network.title}")
        train = ["job.train", str(IMAGES), "--config", "demo", *network.options]
        train += ["--seed", str(seed), "--out", f"{folder}/{network.name}"]
        if network.name == "mgd":
            interrupt(train)
            train += ["--resume", "auto"]
        run(train)
        linear = ["job.linear", str(IMAGES), "--config", "linear-demo", "--seed", str(seed)]
        linear += ["--pretrained", f"{folder}/{network.name}/last.pth.tar"]
        run([*linear, "--out", f"{folder}/{network.name}-linear"])
    heading("The run of the student with MGD")
    run(["job.show.watch", "--once", f"{folder}/mgd"], workers=1)
    run(["job.show.report", str(folder), "--out", f"{folder}/report.html"], workers=1)
    minutes = (time.monotonic() - start) / 60
    heading(f"The features, after {minutes:.1f} minutes")
    measured = accuracies(folder, listed)
    record = {"seed": seed, "minutes": round(minutes, 1), "accuracies": measured}
    write_whole(f"{folder}/demo.json", f"{json.dumps(record, indent=1)}\n".encode())
    for line in table(listed, measured):
        say(line)
    say(END.format(folder=folder))


def clear(folder: Path) -> None:
    """Empty the folder of an earlier demo. RunError: the folder holds something else."""
    try:
        if folder.exists() and any(folder.iterdir()):
            if not (folder / MARK).exists():
                raise RunError(f"{folder}: not empty; expected a new folder. Name another one")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as error:
        raise RunError(
            f"{folder}: {error.strerror or error}; expected a writable folder. Name another one"
        ) from None


def run(command: list[str], workers: int = WORKERS) -> None:
    """Run a command and print its output. RunError: it fails."""
    with started(command, workers) as process:
        show(process)
    if process.returncode:
        raise RunError(
            f"{shown(command, workers)}: exit code {process.returncode}; its error is above",
            process.returncode,
        )


def interrupt(command: list[str]) -> None:
    """Run a command, and kill one of its workers at KILL_AT. RunError: it ends before."""
    with started(command, WORKERS) as process:
        if not show(process, until=KILL_AT):
            raise RunError(f"{shown(command, WORKERS)}: ended before it could be killed")
        worker = training_processes(process)[-1]
        say(f"demo: kill -9 {worker.pid}, one of its {WORKERS} workers")
        worker.kill()
        show(process)
    say("demo: the run is dead. The same command with --resume auto continues it")


@contextlib.contextmanager
def started(command: list[str], workers: int) -> Iterator[subprocess.Popen[str]]:
    """Print and start a command, and wait for its end. It is stopped if the caller fails."""
    say(f"$ {shown(command, workers)}")
    launcher = [] if workers == 1 else [f"{BIN}/horovodrun", "-np", str(workers)]
    try:
        process = subprocess.Popen(
            [*launcher, sys.executable, "-m", *command],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # each worker would need its own GPU
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
    except FileNotFoundError:
        raise RunError(f"{launcher[0]}: missing; expected Horovod. Run make setup") from None
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def shown(command: list[str], workers: int) -> str:
    """Return a command as a user types it."""
    launcher = "" if workers == 1 else f"horovodrun -np {workers} "
    return f"{launcher}{shlex.join(['python', '-m', *command])}"


def show(process: subprocess.Popen[str], until: str = "") -> bool:
    """Print a process's output to its end, or to the first line that starts with `until`.

    Return whether there was such a line.
    """
    assert process.stdout is not None
    for output in process.stdout:
        line = RANK.sub("", output.rstrip("\n"))
        say(line)
        if until and line.startswith(until):
            return True
    process.wait()
    return False


def training_processes(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the workers that a launcher has started."""
    found = []
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if process.cmdline()[1:3] == ["-m", "job.train"]:
                found.append(process)
    return found


def accuracies(folder: Path, listed: list[Network]) -> dict[str, dict[str, float]]:
    """Return the accuracies in percent, {name: {"knn": ..., "linear": ...}}."""
    return {
        network.name: {
            "knn": read_run(folder / network.name).knn[-1]["knn"],
            "linear": read_run(folder / f"{network.name}-linear").validation[-1]["val_top1"],
        }
        for network in listed
    }


def table(listed: list[Network], measured: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a table of accuracies, with a bar of each. The teacher is the last."""
    full = marks_for(sys.stdout.encoding).bar[0]
    lines = [f"{'':24}   k-NN   linear"]
    for network in [*listed[1:], listed[0]]:
        knn, linear = measured[network.name].values()
        bar = full * round(linear / 100 * BAR)
        lines.append(f"{network.title:24}  {knn:4.1f} %  {linear:4.1f} %  {bar}")
    return lines


def heading(text: str) -> None:
    """Print a heading."""
    say(f"\n== {text}")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
