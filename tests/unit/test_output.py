"""Programs whose standard output is full, closed or without a reader."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

NARROW = "-a resnet18 --width 16 --image-size 16 --batch-size 8 --moco-k 16 --mlp -j 0 --epochs 1"
EXPECTED = "expected a terminal, file or pipe with room. Redirect it elsewhere"


def errors_of(command, state):
    """Return the exit code and standard error of a program with its standard output in a state."""
    command = [sys.executable, "-m", *map(str, command)]
    if state == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        return done.returncode, done.stderr
    redirected = {
        "full": ">/dev/full",
        "closed": ">&-",
        "all full": ">/dev/full 2>/dev/full",
        "all closed": "<&- >&- 2>&-",
    }
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {redirected[state]}', "-", *command],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


ENDS = {
    "full": (2, f"error: standard output: No space left on device; {EXPECTED}\n"),
    "closed": (2, f"error: standard output: closed; {EXPECTED}\n"),
    "gone": (141, ""),
    "all full": (2, ""),
    "all closed": (2, ""),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one step."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("arch: resnet18\nepochs: 1\n")
    (folder / "metrics.jsonl").write_text('{"steps": 1, "epoch": 0, "step": 0, "loss": 1.0}\n')
    return folder


@pytest.mark.parametrize("state", ENDS)
@pytest.mark.parametrize("shown", ["runs", "help"])
def test_watch_ends_in_one_line(run, shown, state):
    command = ["job.show.watch", *(["--once", run] if shown == "runs" else ["--help"])]
    assert errors_of(command, state) == ENDS[state]


def test_report_ends_in_one_line(run, tmp_path):
    command = ["job.show.report", "--no-features", run, "--out", tmp_path / "report.html"]
    assert errors_of(command, "full") == ENDS["full"]


@pytest.mark.parametrize("state", ["full", "gone", "all closed"])
def test_pack_ends_in_one_line(images, tmp_path, state):
    assert errors_of(["job.pack", images, tmp_path / "packed"], state) == ENDS[state]


@pytest.mark.parametrize("state", ["all full", "all closed"])
def test_lost_error_keeps_its_exit_code(state):
    assert errors_of(["job.show.watch", "--once", "/nowhere"], state) == (2, "")


@pytest.mark.parametrize(
    ("program", "state"), [("job.train", "closed"), ("job.linear", "full"), ("job.train", "gone")]
)
@pytest.mark.short
def test_run_ends_before_its_folder_is_created(images, tmp_path, program, state):
    options = NARROW if program == "job.train" else "--knn --width 16 --image-size 16 -j 0"
    command = [program, images, *options.split(), "--out", tmp_path / "run"]
    assert errors_of(command, state) == ENDS[state]
    assert not (tmp_path / "run").exists()


INHERITED = """
import subprocess, sys
from job import output

with output.guarded():
    names = "readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2 >$0; true"
    subprocess.run(["bash", "-c", names, sys.argv[1]])
"""


def test_closed_streams_are_null_in_child_processes(tmp_path):
    shell = [
        "bash",
        "-c",
        'exec "$@" <&- >&- 2>&-',
        "-",
        sys.executable,
        "-c",
        INHERITED,
        tmp_path / "names",
    ]
    subprocess.run(shell, check=True)
    assert (tmp_path / "names").read_text().split() == [os.devnull] * 3
