"""The order in which a run's files reach the disk, as a run of the real command makes its system calls."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from inject import injected
from job.checkpoints.folder import load
from runs import of_kind

pytestmark = pytest.mark.slow

OPTIONS = "-a resnet18 --width 16 --image-size 16 --batch-size 8 --moco-k 16 --mlp -j 0 --epochs 1 --save-every 2steps".split()


def train(images, folder, *more, screen=subprocess.PIPE, **variables):
    """Train for six steps, with three checkpoints."""
    command = [sys.executable, "-m", "job.train", images, *OPTIONS, "--out", folder, *more]
    environment = os.environ | variables
    return subprocess.run(
        list(map(str, command)), env=environment, stdout=screen, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def traced(images, tmp_path_factory):
    """A run and its calls; the disk of its standard output is full from the third line on."""
    folder = tmp_path_factory.mktemp("traced")
    rules = [
        f"* {call} {name} 1 9999 0"
        for call in ("write", "fsync")
        for name in ("metrics.jsonl", "log.txt")
    ]
    rules += ["* rename .pth.tar 1 9999 0", "* write /screen 3 9999 28"]
    with open(folder / "screen", "w") as screen:
        done = train(
            images, folder / "run", screen=screen, **injected(*rules, trace=folder / "trace")
        )
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


def test_records_are_synced_before_their_checkpoint(traced):
    places = [
        place
        for place, (call, name) in enumerate(traced.calls)
        if call == "rename" and name.startswith("checkpoint_")
    ]
    assert len(places) == 3
    for place in places:
        for name in ("metrics.jsonl", "log.txt"):
            assert [call for call, of in traced.calls[:place] if of == name][-1] == "fsync"


def test_failed_sync_ends_the_run_without_checkpoint(images, tmp_path):
    done = train(images, tmp_path / "run", **injected("* fsync metrics.jsonl 2 1 5"))
    path = tmp_path / "run" / "metrics.jsonl"
    said = f"error: cannot write to {path}: Input/output error; the checkpoints are untouched. "
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth.tar*"))
    assert names == ["checkpoint_0000_000002.pth.tar", "last.pth.tar"]
    assert load(str(tmp_path / "run" / "last.pth.tar"))["step"] == 2


def test_resume_reports_missing_records(images, traced, tmp_path):
    """As of a folder whose metrics.jsonl was copied before its checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(traced.folder, folder, symlinks=True)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(line for line in lines if '"steps": 5' not in line and '"steps": 6' not in line)
    )
    done = train(images, folder, "--epochs", 2, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"{path}: the records of steps 5 to 6 are missing; the run continues\n" in done.stdout


def test_resume_from_another_folder_misses_no_records(images, traced, tmp_path):
    done = train(
        images, tmp_path / "run", "--epochs", 2, "--resume", traced.folder / "last.pth.tar"
    )
    assert done.returncode == 0, done.stderr
    assert "are missing" not in done.stdout
