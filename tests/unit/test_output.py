"""Standard output that is full, closed or without a reader: what each program makes of it."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

NARROW = "-a resnet18 --width 16 --image-size 16 --batch-size 8 --moco-k 16 --mlp -j 0 --epochs 1".split()
EXPECTED = "expected a terminal, file or pipe with room. Redirect it elsewhere"


def errors_of(command, state):
    """The exit code and standard error of a program whose standard output is in `state`."""
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
    """A run that can be shown."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("arch: resnet18\nepochs: 1\n")
    (folder / "metrics.jsonl").write_text('{"steps": 1, "epoch": 0, "step": 0, "loss": 1.0}\n')
    return folder


@pytest.mark.parametrize("state", ENDS)
@pytest.mark.parametrize("shown", ["runs", "help"])
def test_lost_results_end_a_program_that_shows_runs_in_one_line(run, shown, state):
    command = ["job.show.watch", *(["--once", run] if shown == "runs" else ["--help"])]
    assert errors_of(command, state) == ENDS[state]


@pytest.mark.parametrize("state", ["full", "gone"])
def test_lost_results_end_a_report_in_one_line(run, tmp_path, state):
    assert (
        errors_of(
            ["job.show.report", "--no-features", run, "--out", tmp_path / "report.html"], state
        )
        == ENDS[state]
    )


@pytest.mark.parametrize("state", ENDS)
def test_lost_lines_end_a_packing_in_one_line(images, tmp_path, state):
    assert errors_of(["job.pack", images, tmp_path / "packed"], state) == ENDS[state]


@pytest.mark.parametrize("state", ["all full", "all closed"])
def test_a_lost_error_keeps_its_exit_code(state):
    assert errors_of(["job.show.watch", "--once", "/nowhere"], state) == (2, "")


@pytest.mark.parametrize(
    ("program", "state"), [("job.train", "closed"), ("job.linear", "full"), ("job.train", "gone")]
)
def test_a_run_without_standard_output_ends_before_its_folder_is_made(
    images, tmp_path, program, state
):
    options = (
        NARROW if program == "job.train" else ["--knn", "--width", 16, "--image-size", 16, "-j", 0]
    )
    assert errors_of([program, images, *options, "--out", tmp_path / "run"], state) == ENDS[state]
    assert not (tmp_path / "run").exists()


INHERITED = """
import subprocess, sys
from job import output

with output.guarded():
    subprocess.run(["bash", "-c", "readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2 >$0; true", sys.argv[1]])
"""


def test_no_file_gets_the_place_of_a_closed_stream_in_a_child_process(tmp_path):
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
