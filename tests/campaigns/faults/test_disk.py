"""Full, read-only, missing and slow disks: one line of error, and a complete checkpoint.

The disks are the kernel's mounts and limits, which need root. Without it the tests are skipped.
"""

import errno
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from disks import mount, unmount
from job.checkpoints.folder import load
from job.show.watch import app
from job.checkpoints.foreign import read_backbone
from runs import of_kind

REPO = Path(__file__).parents[3]
SMALL = "-a resnet18 --image-size 32 --batch-size 8 --moco-k 20 --mlp -j 0 --keep 1".split()
SMALL += "--print-freq 1 --resume auto".split()
STEPS = "--save-every 2steps --epochs 5".split()
CHECKPOINT = 140  # MB of a checkpoint with SMALL
THROTTLE = Path("/sys/fs/cgroup/blkio")  # of cgroup version 1


@pytest.fixture
def disk(tmp_path):
    """An empty disk in memory with room for one checkpoint of SMALL, not for two."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={CHECKPOINT * 3 // 2}m", "tmpfs", path)
    yield path
    unmount(path)


@pytest.fixture
def slow_disk(tmp_path):
    """A function (process, MB/s) that limits a process's writes to the disk of `tmp_path`."""
    limit = THROTTLE / "blkio.throttle.write_bps_device"
    if not limit.exists() or not os.access(THROTTLE, os.W_OK):
        pytest.skip(f"cannot slow down a disk: no writable {THROTTLE}")
    number = tmp_path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    device = device.parent if (device / "partition").exists() else device
    if not (device / "dev").exists():
        pytest.skip(f"cannot slow down a disk: {tmp_path} is not on a block device")
    group = THROTTLE / f"faults-{os.getpid()}"
    group.mkdir()

    def slow(process, rate):
        rule = f"{(device / 'dev').read_text().strip()} {rate * 10**6}"
        (group / "blkio.throttle.write_bps_device").write_text(rule)
        (group / "cgroup.procs").write_text(str(process.pid))

    yield slow
    deadline = time.monotonic() + 120
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    group.rmdir()


def fill(disk):
    """Fill a disk completely."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def check_refused(job, error):
    """Check that a run ends with exit code 2 and one line of error, which starts with `error`."""
    output = job.finish()
    errors = [line.partition("error: ")[2] for line in output.splitlines() if ":error: " in line]
    assert len(errors) == 1 and errors[0].startswith(error), output
    assert job.process.returncode == 2 and "Traceback" not in output


def check_checkpoint(folder, epoch, step):
    """Check that a folder has one complete checkpoint, a link to it, and no temporary file."""
    name = f"checkpoint_{epoch:04d}_{step:06d}.pth.tar"
    assert sorted(path.name for path in folder.glob("*.pth.tar*")) == [name, "last.pth.tar"]
    assert os.readlink(folder / "last.pth.tar") == name
    content = load(str(folder / "last.pth.tar"))
    assert (content["epoch"], content["step"]) == (epoch, step)


def settle(folder, before, signalled):
    """Run the SLURM scripts' `settle 2` for a job whose newest checkpoint was `before`."""
    script = f"""set -euo pipefail
    . {REPO}/slurm/functions.sh
    scontrol() {{ echo " JobState=RUNNING "; }}
    RUN={folder} MAX_REQUEUES=20 SLURM_JOB_ID=1 signalled={signalled} before={before}
    settle 2"""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


def test_disk_full_at_a_checkpoint(start_job, images, disk):
    """The same command fails again. With more room, it resumes and reaches the end."""
    folder = disk / "run"
    for _ in range(2):
        error = f"cannot save {folder}/checkpoint_0000_000004.pth.tar: No space left on device"
        error += "; the checkpoints before it are untouched"
        check_refused(start_job(2, folder, [images, *SMALL, *STEPS]), error)
        check_checkpoint(folder, 0, 2)
    mount("-o", f"remount,size={CHECKPOINT * 3}m", disk)
    job = start_job(2, folder, [images, *SMALL, *STEPS])
    output = job.finish()
    assert job.process.returncode == 0, output
    assert of_kind(folder, "resumed")
    check_checkpoint(folder, 5, 0)


@pytest.mark.short
def test_disk_full_at_a_signal(start_job, images, disk):
    folder = disk / "run"
    job = start_job(2, folder, [images, *SMALL, "--save-every", "7steps", "--epochs", 50])
    job.wait_for_step(8)
    job.workers()[1].send_signal(signal.SIGUSR2)
    check_refused(job, f"cannot save {folder}/checkpoint_000")
    check_checkpoint(folder, 1, 1)


def test_disk_full_for_the_log(start_job, images, disk):
    folder = disk / "run"
    job = start_job(2, folder, [images, *SMALL, "--save-every", "4steps", "--epochs", 1000])
    job.wait_for_step(5)
    job.kill()
    job = start_job(2, folder, [images, *SMALL, "--save-every", "999", "--epochs", 1000])
    job.wait_for_step(6)
    fill(disk)
    check_refused(job, f"cannot write to {folder}/")
    check_checkpoint(folder, 0, 4)
    check_refused(start_job(2, folder, [images, *SMALL, *STEPS]), f"cannot write to {folder}")
    assert not (folder / "metrics.jsonl.new").exists()
    (disk / "filler").unlink()
    job = start_job(2, folder, [images, *SMALL, "--save-every", "999", "--epochs", 1])
    output = job.finish()
    # The disk has room for one checkpoint, not for two.
    assert job.process.returncode != 0 and "No space left on device" in output
    assert job.steps() == list(range(1, 7))


@pytest.mark.parametrize("when", ["from the start", "during the run"])
def test_folder_read_only(start_job, images, disk, when):
    folder = disk / "run"
    folder.mkdir()
    if when == "from the start":
        mount("-o", "remount,ro", disk)
        check_refused(
            start_job(2, folder, [images, *SMALL, *STEPS]),
            f"cannot write to {folder}: Read-only file system; choose another",
        )
        assert list(folder.iterdir()) == []
        return
    job = start_job(2, folder, [images, *SMALL, "--save-every", "40steps", "--epochs", 50])
    job.wait_for_step(41)
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    error = f"cannot save {folder}/checkpoint_0013_000002.pth.tar: Read-only file system"
    check_refused(job, f"{error}; the checkpoints before it are untouched")
    check_checkpoint(folder, 6, 4)


@pytest.mark.parametrize("signalled", ["", "USR2"])
def test_folder_missing(start_job, images, tmp_path, signalled):
    """A SLURM job is not requeued then. It would start again at the first epoch in a new folder."""
    folder = tmp_path / "run"
    job = start_job(2, folder, [images, *SMALL, "--save-every", "20steps", "--epochs", 50])
    job.wait_for_step(21)
    before = os.readlink(folder / "last.pth.tar")
    folder.rename(tmp_path / "moved")
    if signalled:
        job.workers()[0].send_signal(signal.SIGUSR2)
    check_refused(job, f"cannot save {folder}/checkpoint_000")
    assert not folder.exists()
    check_checkpoint(tmp_path / "moved", 3, 2)
    done = settle(folder, before, signalled)
    assert done.returncode == 2 and '"reason": "mistake"' in done.stdout, done.stdout + done.stderr


def test_disk_slow(start_job, images, slow_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "2")
    job = start_job(2, tmp_path / "run", [images, *SMALL, "--save-every", "1", "--epochs", 2])
    job.wait_for_step(1)
    slow_disk(first_worker(job), 25)
    output = job.finish()
    assert job.process.returncode == 0, output
    waits = r"rank 1 on \S+ waits for 'broadcast.length' at \S+ for \d+ s; "
    assert re.search(waits + r"rank 0 on \S+ is at job/checkpoints/folder.py", output)
    check_checkpoint(tmp_path / "run", 2, 0)


def test_disk_too_slow(start_job, images, slow_disk, tmp_path, monkeypatch):
    """The run ends and leaves a complete checkpoint."""
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "2")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "4")
    options = [images, *SMALL, "--save-every", "10steps", "--epochs", 5]
    job = start_job(2, tmp_path / "run", options)
    job.wait_for_step(11)
    slow_disk(first_worker(job), 12)
    output = job.finish()
    assert job.process.returncode != 0, output
    assert "ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=4" in output, output
    # Rank 0 completes its checkpoint if it has the time.
    assert load(str(tmp_path / "run" / "last.pth.tar"))["step"] in (4, 2)
    again = start_job(2, tmp_path / "run", options)
    output = again.finish()
    assert again.process.returncode == 0, output
    check_checkpoint(tmp_path / "run", 5, 0)


def test_disk_without_links(start_job, images, linkless, capsys):
    """A killed run resumes from last.pth.tar by name, and other programs read that file."""
    folder = linkless / "run"
    last = folder / "last.pth.tar"
    narrow = [images, *SMALL, "--width", 16, "--save-every", "2steps", "--epochs", 3]
    job = start_job(2, folder, narrow)
    job.wait_for_step(9)
    job.kill()
    output = start_job(2, folder, [*narrow, "--resume", last]).finish()
    assert len(of_kind(folder, "resumed")) == 1, output
    assert of_kind(folder, "end")[-1]["how"] == "complete", output
    newest = folder / "checkpoint_0003_000000.pth.tar"
    assert sorted(folder.glob("*.pth.tar*")) == [newest, last]
    assert last.read_bytes() == newest.read_bytes()
    app.main(["--once", str(folder)])
    assert newest.name in capsys.readouterr().out
    assert read_backbone(str(last)).meta["epoch"] == 3


def first_worker(job):
    """Return the process of rank 0."""
    return next(worker for worker in job.workers() if worker.environ()["HOROVOD_RANK"] == "0")
