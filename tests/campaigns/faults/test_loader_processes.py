"""Killed and hanging loader processes of real runs, and a small /dev/shm."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from runs import Job, of_kind

FEW = "-a resnet18 --image-size 64 --batch-size 32 --moco-k 32 --mlp -j 1".split()
FEW += "--print-freq 1 --epochs 200".split()


def loader_processes(job: Job) -> dict[int, psutil.Process]:
    """Return the loader process of each worker by rank. Their parents are the fork servers."""
    return {
        int(worker.environ()["HOROVOD_RANK"]): server.children()[0]
        for worker in job.workers()
        for server in worker.children()
        if server.children()
    }


def errors(output: str) -> list[str]:
    """Return the lines of errors without the launcher's prefix."""
    return [line.split("<stderr>:", 1)[-1] for line in output.splitlines() if "error: " in line]


@pytest.mark.short
def test_killed_loader_process_ends_all_workers(start_job, images, tmp_path):
    """The error names the process and its file."""
    job = start_job(2, tmp_path / "run", [images, *FEW])
    job.wait_for_step(1)
    killed = loader_processes(job)[1]
    killed.kill()
    output = job.finish()
    assert job.process.returncode != 0
    first, *others = errors(output)
    assert first.startswith("error: rank 1 on ")
    assert (
        f"loader process {killed.pid} was ended by SIGKILL while it read {images}/train/class"
        in first
    )
    assert all("another worker is gone" in line for line in others), output
    # Other lines are the launcher's.
    of_workers = [line for line in output.splitlines() if line.startswith("[")]
    assert not any("Traceback" in line for line in of_workers)


def test_hanging_loader_process_and_a_signal(start_job, images, tmp_path, monkeypatch):
    """A warning names the process, and a signal ends the run."""
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "3")
    job = start_job(2, tmp_path / "run", [images, *FEW])
    job.wait_for_step(1)
    loader_processes(job)[0].send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 120
    before = len(of_kind(tmp_path / "run", "warning"))  # the first batch may have been slow
    while len(of_kind(tmp_path / "run", "warning")) == before:
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job.process.send_signal(signal.SIGTERM)
    output = job.finish()
    first, *others = errors(output)
    assert (
        first.startswith("error: rank 0 on ") and "SIGTERM arrived, but no batch in 45 s" in first
    )
    assert f"{images}/train/class" in first
    assert all("another worker is gone" in line for line in others), output


def test_run_with_a_small_dev_shm(images, tmp_path):
    """256 KiB are enough for the locks of multiprocessing. A batch has 384 KiB."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    train = [launcher, "-np", "2", sys.executable, "-m", "job.train", str(images), *FEW]
    train += ["--epochs", "1", "--out", str(tmp_path)]
    mount = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *train],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "complete").exists()
