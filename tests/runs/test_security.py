"""What whole runs must not give away."""

import os
import stat

import pytest

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp --moco-t 0.2 -j 0 --keep 9".split()
STEPS = 50 // 8  # of an epoch
SECRET = "hunter2-of-{}-is-not-to-be-seen"
# As they come from a shell, a scheduler, and those who put them where a launcher hands them on.
NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
    "SLURM_JWT",
    "HOROVOD_TOKEN",
    "MGD_SECRET",
    "NCCL_TOKEN",
    "LOGNAME_TOKEN",
]
# The second epoch ends by an error that nobody has foreseen, in a function whose locals have the environment.
FAIL = f"""
import os
if "HOROVOD_RANK" in os.environ:
    import torch
    step, done = torch.optim.SGD.step, []

    def failing(self, *arguments, **named):
        step(self, *arguments, **named)
        done.append(dict(os.environ))
        if len(done) == {STEPS + 2}:
            raise ZeroDivisionError("what nobody has foreseen")

    torch.optim.SGD.step = failing
"""


@pytest.fixture(scope="module")
def failed(start_job, images, tmp_path_factory):
    """Folder and output of a run of two workers that saves, and fails then; its umask is neither usual nor the strictest."""
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
    assert (
        job.process.returncode != 0
        and "error: rank" in output
        and "what nobody has foreseen" in output
    ), output
    return job.folder, output


def test_no_variable_s_value_gets_into_the_folder_or_the_output(failed):
    folder, output = failed
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"last.pth.tar", "metrics.jsonl", "log.txt", "config.yaml"} <= set(files)
    for name in NAMES:
        assert SECRET.format(name) not in output
        assert [
            file for file, content in files.items() if SECRET.format(name).encode() in content
        ] == []


def test_what_a_run_writes_follows_the_umask(failed):
    folder, _ = failed
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o660) and len(modes) >= 5
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o770] * 2
