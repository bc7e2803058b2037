"""Secrets and permissions of a run's files."""

import os
import stat

import pytest

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp".split()
SMALL += "--moco-t 0.2 -j 0 --keep 9".split()
STEPS = 50 // 8  # of an epoch
SECRET = "hunter2-of-{}-must-stay-secret"
# From a shell, a scheduler, and users who set variables that a launcher passes on.
NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
    "SLURM_JWT",
    "HOROVOD_TOKEN",
    "MGD_SECRET",
    "NCCL_TOKEN",
    "LOGNAME_TOKEN",
]
# The second epoch ends with an unexpected error, in a function whose locals have the environment.
FAIL = f"""
import os
if "HOROVOD_RANK" in os.environ:
    import torch
    step, done = torch.optim.SGD.step, []

    def failing(self, *arguments, **named):
        step(self, *arguments, **named)
        done.append(dict(os.environ))
        if len(done) == {STEPS + 2}:
            raise ZeroDivisionError("an unexpected error")

    torch.optim.SGD.step = failing
"""


@pytest.fixture(scope="module")
def failed(start_job, images, tmp_path_factory):
    """Folder and output of a run of two workers that saves, then fails, with an unusual umask."""
    folder = tmp_path_factory.mktemp("security")
    (folder / "sitecustomize.py").write_text(FAIL)
    before = os.umask(0o007)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            for name in NAMES:
                patch.setenv(name, SECRET.format(name))
            job = start_job(2, folder / "runs" / "run", [images, *SMALL])
    finally:
        os.umask(before)
    output = job.finish()
    assert job.process.returncode != 0, output
    assert "error: rank" in output and "an unexpected error" in output, output
    return job.folder, output


def test_secrets_are_not_written(failed):
    folder, output = failed
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"last.pth.tar", "metrics.jsonl", "log.txt", "config.yaml"} <= set(files)
    for name in NAMES:
        secret = SECRET.format(name)
        assert secret not in output
        assert [file for file, content in files.items() if secret.encode() in content] == []


def test_files_follow_the_umask(failed):
    folder, _ = failed
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o660) and len(modes) >= 5
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o770] * 2
