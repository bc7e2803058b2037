"""Disks that are full, read-only, gone or slow, for real: one clear line, and the checkpoint before stays whole.

The disks are mounts and limits of the kernel's, which root may make; where that is not allowed, the tests are skipped.
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
SMALL = "-a resnet18 --image-size 32 --batch-size 8 --moco-k 20 --mlp -j 0 --keep 1 --print-freq 1 --resume auto".split()
STEPS = "--save-every 2steps --epochs 5".split()
CHECKPOINT = 140  # MB that one of SMALL has
THROTTLE = Path("/sys/fs/cgroup/blkio")  # of cgroup's first version


@pytest.fixture
def disk(tmp_path):
    """An empty disk in memory, with room for one checkpoint of SMALL, but not for two."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={CHECKPOINT * 3 // 2}m", "tmpfs", path)
    yield path
    unmount(path)


@pytest.fixture
def slow_disk(tmp_path):
    """A function (process, MB/s): lets the process write no more than that a second to the disk of `tmp_path`."""
    if not (THROTTLE / "blkio.throttle.write_bps_device").exists() or not os.access(
        THROTTLE, os.W_OK
    ):
        pytest.skip(f"no {THROTTLE} of one's own here: a disk cannot be slowed down")
    device = Path(
        f"/sys/dev/block/{os.major(tmp_path.stat().st_dev)}:{os.minor(tmp_path.stat().st_dev)}"
    ).resolve()
    device = device.parent if (device / "partition").exists() else device
    if not (device / "dev").exists():
        pytest.skip(f"{tmp_path} lies on no block device: it cannot be slowed down")
    group = THROTTLE / f"faults-{os.getpid()}"
    group.mkdir()

    def slow(process, rate):
        (group / "blkio.throttle.write_bps_device").write_text(
            f"{(device / 'dev').read_text().strip()} {rate * 10**6}"
        )
        (group / "cgroup.procs").write_text(str(process.pid))

    yield slow
    deadline = time.monotonic() + 120
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    group.rmdir()


def fill(disk):
    """Leave no room on a disk."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def refused(job, said):
    """The run ends with one line that begins as `said`, said once, and with 2 on all workers."""
    output = job.finish()
    errors = [line.partition("error: ")[2] for line in output.splitlines() if ":error: " in line]
    assert len(errors) == 1 and errors[0].startswith(said), output
    assert job.process.returncode == 2 and "Traceback" not in output


def whole(folder, epoch, step):
    """The folder's one checkpoint, to which `last` points, is whole, and nothing half-written is there."""
    name = f"checkpoint_{epoch:04d}_{step:06d}.pth.tar"
    assert sorted(path.name for path in folder.glob("*.pth.tar*")) == [name, "last.pth.tar"]
    assert os.readlink(folder / "last.pth.tar") == name
    content = load(str(folder / "last.pth.tar"))
    assert (content["epoch"], content["step"]) == (epoch, step)


def settled(folder, before, signalled):
    """What the SLURM scripts do with a job whose tasks have ended with 2, and whose newest checkpoint was `before`."""
    script = f"""set -euo pipefail
    . {REPO}/slurm/functions.sh
    scontrol() {{ echo " JobState=RUNNING "; }}
    RUN={folder} MAX_REQUEUES=20 SLURM_JOB_ID=1 signalled={signalled} before={before}
    settle 2"""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


def test_a_disk_that_is_full_at_a_checkpoint(start_job, images, disk):
    """Again with the same command, which gets no further; and with more room it goes on to the end."""
    folder = disk / "run"
    for _ in range(2):
        said = f"cannot save {folder}/checkpoint_0000_000004.pth.tar: No space left on device; the checkpoints before it are "
        refused(start_job(2, folder, [images, *SMALL, *STEPS]), said + "untouched")
        whole(folder, 0, 2)
    mount("-o", f"remount,size={CHECKPOINT * 3}m", disk)
    job = start_job(2, folder, [images, *SMALL, *STEPS])
    output = job.finish()
    assert job.process.returncode == 0, output
    assert of_kind(folder, "resumed")
    whole(folder, 5, 0)


def test_a_disk_that_is_full_when_a_signal_asks_for_a_save(start_job, images, disk):
    folder = disk / "run"
    job = start_job(2, folder, [images, *SMALL, "--save-every", "7steps", "--epochs", 50])
    job.wait_for_step(8)
    job.workers()[1].send_signal(signal.SIGUSR2)
    refused(job, f"cannot save {folder}/checkpoint_000")
    whole(folder, 1, 1)


def test_a_disk_too_full_for_the_log(start_job, images, disk):
    folder = disk / "run"
    job = start_job(2, folder, [images, *SMALL, "--save-every", "4steps", "--epochs", 1000])
    job.wait_for_step(5)
    job.kill()
    job = start_job(2, folder, [images, *SMALL, "--save-every", "999", "--epochs", 1000])
    job.wait_for_step(6)
    fill(disk)
    refused(job, f"cannot write to {folder}/")
    whole(folder, 0, 4)
    refused(start_job(2, folder, [images, *SMALL, *STEPS]), f"cannot write to {folder}")
    assert not (folder / "metrics.jsonl.new").exists()
    (disk / "filler").unlink()
    job = start_job(2, folder, [images, *SMALL, "--save-every", "999", "--epochs", 1])
    output = job.finish()
    assert (
        job.process.returncode != 0 and "No space left on device" in output
    )  # room for a checkpoint, but not for two
    assert job.steps() == list(range(1, 7))


@pytest.mark.parametrize("when", ["from the start", "in the course"])
def test_a_folder_that_is_read_only(start_job, images, disk, when):
    folder = disk / "run"
    folder.mkdir()
    if when == "from the start":
        mount("-o", "remount,ro", disk)
        refused(
            start_job(2, folder, [images, *SMALL, *STEPS]),
            f"cannot write to {folder}: Read-only file system; choose another",
        )
        assert list(folder.iterdir()) == []
        return
    job = start_job(2, folder, [images, *SMALL, "--save-every", "40steps", "--epochs", 50])
    job.wait_for_step(41)
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    refused(
        job,
        f"cannot save {folder}/checkpoint_0013_000002.pth.tar: Read-only file system; the checkpoints before it are untouched",
    )
    whole(folder, 6, 4)


@pytest.mark.parametrize("signalled", ["", "USR2"])
def test_a_folder_that_is_gone(start_job, images, tmp_path, signalled):
    """A SLURM job that is requeued then would begin anew, at the first epoch, in a new folder."""
    folder = tmp_path / "run"
    job = start_job(2, folder, [images, *SMALL, "--save-every", "20steps", "--epochs", 50])
    job.wait_for_step(21)
    before = os.readlink(folder / "last.pth.tar")
    folder.rename(tmp_path / "moved")
    if signalled:
        job.workers()[0].send_signal(signal.SIGUSR2)
    refused(job, f"cannot save {folder}/checkpoint_000")
    assert not folder.exists()
    whole(tmp_path / "moved", 3, 2)
    done = settled(folder, before, signalled)
    assert done.returncode == 2 and '"reason": "mistake"' in done.stdout, done.stdout + done.stderr


def test_a_slow_disk_is_said_and_waited_for(start_job, images, slow_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "2")
    job = start_job(2, tmp_path / "run", [images, *SMALL, "--save-every", "1", "--epochs", 2])
    job.wait_for_step(1)
    slow_disk(first_worker(job), 25)
    output = job.finish()
    assert job.process.returncode == 0, output
    assert re.search(
        r"rank 1 on \S+ waits for 'broadcast.length' at \S+ for \d+ s; rank 0 on \S+ is at job/checkpoints/folder.py",
        output,
    )
    whole(tmp_path / "run", 2, 0)


def test_a_disk_too_slow_ends_the_run_and_leaves_a_whole_checkpoint(
    start_job, images, slow_disk, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "2")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "4")
    job = start_job(2, tmp_path / "run", [images, *SMALL, "--save-every", "10steps", "--epochs", 5])
    job.wait_for_step(11)
    slow_disk(first_worker(job), 12)
    output = job.finish()
    assert (
        job.process.returncode != 0
        and "ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=4" in output
    ), output
    # Rank 0 brings what it writes to its end where it is given the time.
    assert load(str(tmp_path / "run" / "last.pth.tar"))["step"] in (4, 2)
    again = start_job(
        2, tmp_path / "run", [images, *SMALL, "--save-every", "10steps", "--epochs", 5]
    )
    output = again.finish()
    assert again.process.returncode == 0, output
    whole(tmp_path / "run", 5, 0)


def test_a_disk_without_links(start_job, images, linkless, capsys):
    """A run is killed, resumes from last.pth.tar by name, and others read that file."""
    folder = linkless / "run"
    last = folder / "last.pth.tar"
    narrow = [images, *SMALL, "--width", 16, "--save-every", "2steps", "--epochs", 3]
    job = start_job(2, folder, narrow)
    job.wait_for_step(9)
    job.kill()
    output = start_job(2, folder, [*narrow, "--resume", last]).finish()
    assert (
        len(of_kind(folder, "resumed")) == 1 and of_kind(folder, "end")[-1]["how"] == "complete"
    ), output
    newest = folder / "checkpoint_0003_000000.pth.tar"
    assert sorted(folder.glob("*.pth.tar*")) == [newest, last]
    assert last.read_bytes() == newest.read_bytes()
    app.main(["--once", str(folder)])
    assert newest.name in capsys.readouterr().out
    assert read_backbone(str(last)).meta["epoch"] == 3


def first_worker(job):
    """The process of rank 0."""
    return next(worker for worker in job.workers() if worker.environ()["HOROVOD_RANK"] == "0")
