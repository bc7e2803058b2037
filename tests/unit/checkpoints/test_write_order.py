"""The order of a run's writes and syncs, and the records that a resume reports missing."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from inject import injected
from job.checkpoints.folder import load
from job.config import read_config
from job.train import train
from runs import of_kind

pytestmark = pytest.mark.slow

OPTIONS = "-a resnet18 --width 16 --image-size 16 --batch-size 8 --moco-k 16 --mlp -j 0"
OPTIONS = f"{OPTIONS} --epochs 1 --save-every 2steps".split()


def start(images, folder, screen=subprocess.PIPE, **variables):
    """Train for six steps, with three checkpoints, in a process with environment variables."""
    command = [sys.executable, "-m", "job.train", images, *OPTIONS, "--out", folder]
    environment = os.environ | variables
    return subprocess.run(
        list(map(str, command)), env=environment, stdout=screen, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def traced(images, tmp_path_factory):
    """A run and its system calls. Its standard output's disk is full after two lines."""
    folder = tmp_path_factory.mktemp("traced")
    rules = [
        f"* {call} {name} 1 9999 0"
        for call in ("write", "fsync")
        for name in ("metrics.jsonl", "log.txt")
    ]
    rules += ["* rename .pth.tar 1 9999 0", "* write /screen 3 9999 28"]
    with open(folder / "screen", "w") as screen:
        done = start(images, folder / "run", screen, **injected(*rules, trace=folder / "trace"))
    calls = [line.split(" ", 1) for line in (folder / "trace").read_text().splitlines()]
    return SimpleNamespace(
        done=done,
        folder=folder / "run",
        calls=[(call, os.path.basename(path)) for call, path in calls],
    )


def test_full_standard_output_does_not_end_the_run(traced):
    [warning] = [
        record["text"]
        for record in of_kind(traced.folder, "warning")
        if record["id"] == "standard_output"
    ]
    assert "No space left on device" in warning and f"{traced.folder}/log.txt" in warning
    assert (traced.done.returncode, traced.done.stderr) == (0, f"warning: {warning}\n")
    assert (traced.folder / "log.txt").read_text().count(warning) == 1
    [end] = of_kind(traced.folder, "end")
    assert len(of_kind(traced.folder, "saved")) == 3 and end["how"] == "complete"


@pytest.mark.short
def test_records_are_synced_before_their_checkpoint(traced):
    renames = [
        index
        for index, (call, name) in enumerate(traced.calls)
        if call == "rename" and name.startswith("checkpoint_")
    ]
    assert len(renames) == 3
    for index in renames:
        for name in ("metrics.jsonl", "log.txt"):
            assert [call for call, of in traced.calls[:index] if of == name][-1] == "fsync"


@pytest.mark.short
def test_failed_sync_ends_the_run_without_checkpoint(images, tmp_path):
    done = start(images, tmp_path / "run", **injected("* fsync metrics.jsonl 2 1 5"))
    path = tmp_path / "run" / "metrics.jsonl"
    error = f"error: cannot write to {path}: Input/output error; the checkpoints are untouched. "
    assert done.returncode == 2 and done.stderr.startswith(error) and done.stderr.count("\n") == 1
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth.tar*"))
    assert names == ["checkpoint_0000_000002.pth.tar", "last.pth.tar"]
    assert load(str(tmp_path / "run" / "last.pth.tar"))["step"] == 2


def resume(images, folder, checkpoint):
    """Train for six steps more, in this process."""
    options = ["--out", folder, "--epochs", 2, "--resume", checkpoint]
    train(read_config([str(each) for each in [images, *OPTIONS, *options]]))


def test_resume_reports_missing_records(images, traced, tmp_path, capsys):
    """A copy of metrics.jsonl can be older than the copy of its checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(traced.folder, folder, symlinks=True)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(line for line in lines if '"steps": 5' not in line and '"steps": 6' not in line)
    )
    resume(images, folder, "auto")
    line = f"{path}: the records of steps 5 to 6 are missing; the run continues\n"
    assert line in capsys.readouterr().out


def test_resume_from_another_folder_misses_no_records(images, traced, tmp_path, capsys):
    resume(images, tmp_path / "run", traced.folder / "last.pth.tar")
    assert "are missing" not in capsys.readouterr().out
    assert len(of_kind(tmp_path / "run", "saved")) == 3
