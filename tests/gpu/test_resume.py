"""Runs on the device: repeats and resumes after kills give the same bytes."""

import hashlib

import pytest
import torch

from runs import Job, differences, of_kind, tensors

STEPS = 2 * (50 // 12)  # of both epochs
GPUS = max(1, torch.cuda.device_count())
RUN = "--epochs 2 --batch-size 12 --moco-k 24 --save-every 2steps --keep 9".split()
RUN += ["--refresh-epochs", "0,1", "--deterministic"]
WAYS = {
    "float32": [],
    "bf16": ["--precision", "bf16"],
    "bf16 device views": ["--precision", "bf16", "--augment-on", "device"],
}
pytestmark = pytest.mark.usefixtures("unset")  # each run sets its variables itself


def digest(folder):
    """Return a digest of the newest checkpoint, without its options."""
    content = torch.load(folder / "last.pth.tar", map_location="cpu", weights_only=True)
    sha256 = hashlib.sha256()
    for path, value in sorted(tensors(content), key=lambda pair: pair[0]):
        if not path.startswith("/config"):
            sha256.update(path.encode() + raw(value))
    return sha256.hexdigest()[:16]


def raw(value):
    """Return the bytes of a checkpoint's value."""
    if not torch.is_tensor(value):
        return repr(value).encode()
    return f"{value.dtype} {list(value.shape)}".encode() + value.numpy().tobytes()


def finish(job):
    output = job.finish()
    assert job.process.returncode == 0, output
    assert of_kind(job.folder, "end")[-1]["how"] == "complete"
    return job.folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("workers", [1, *([GPUS] if GPUS > 1 else [])])
def test_killed_run_resumes_to_the_same_bytes(
    workers, way, device, network, images, teacher, tmp_path, record_property
):
    if 12 % workers:
        pytest.skip(f"a batch of 12 images cannot be divided by {workers} workers")
    arguments = [images, *network, *RUN, *WAYS[way], "-j", 1, "--teacher", teacher]
    once, again = (finish(Job(workers, tmp_path / name, arguments)) for name in ("once", "again"))
    record_property("digests", [digest(once), digest(again)])
    assert differences(once, again) == []

    killed = tmp_path / "killed"
    for step in (3, 6):
        job = Job(workers, killed, [*arguments, "--resume", "auto"])
        job.wait_for_step(step)
        job.kill()
    finish(Job(workers, killed, [*arguments, "--resume", "auto"]))
    record_property("killed", digest(killed))
    assert digest(killed) == digest(once)
    assert [record["steps"] for record in of_kind(killed, "step")] == list(range(1, STEPS + 1))
    on_gpu = not of_kind(killed, "start")[-1]["device"].startswith("CPU")
    assert on_gpu == (device.type == "cuda")
