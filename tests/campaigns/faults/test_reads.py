"""Image files whose reads fail for a moment, or for good, in real runs: no image is replaced, and the bytes stay the same."""

import errno

import pytest

from inject import injected
from job.data.folders import TrainingOrder, scan
from job.checkpoints.folder import load
from runs import differences, records

RUN = "-a resnet18 --width 16 --image-size 16 --batch-size 10 --moco-k 20 --moco-dim 16 --mlp -j 1 --epochs 2 --keep 1".split()
MORE = "--print-freq 1 --mgd-images 40 --refresh-epochs 1 --knn-every 1".split()
# Of each process that opens or reads these files, the first try fails.
FOR_A_MOMENT = [
    f"* open /train/class0/4.png 1 1 {errno.ESTALE}",
    f"* read /train/class1/7.png 1 1 {errno.EIO}",
    f"* open /val/class0/52.png 1 1 {errno.EACCES}",
]


def read_twice(images):
    """The first image that rank 1 reads in both epochs."""
    found = scan(str(images), "train")
    draws = [
        draw
        for batch in TrainingOrder(found, 10, rank=1, size=2, seed=0, epochs=2)
        for draw in batch
    ]
    first, second = ({index for epoch, index in draws if epoch == number} for number in (0, 1))
    return found.names[min(first & second)]


@pytest.fixture
def started(start_job, images, teacher_file, tmp_path, monkeypatch):
    """A function that starts a run of two workers under faults, and returns its exit code, output and folder."""

    def start(name, *rules):
        with monkeypatch.context() as context:
            for variable, value in injected(*rules).items() if rules else ():
                context.setenv(variable, value)
            job = start_job(2, tmp_path / name, [images, *RUN, *MORE, "--teacher", teacher_file])
        output = job.finish()
        return job.process.returncode, output, tmp_path / name

    return start


def test_reads_that_fail_for_a_moment_or_for_good_change_no_byte(started, images):
    """In refreshes, k-NN and training."""
    code, output, plain = started("plain")
    assert code == 0, output
    code, output, disturbed = started("disturbed", *FOR_A_MOMENT)
    assert code == 0, output
    for file in ("train/class0/4.png", "train/class1/7.png", "val/class0/52.png"):
        assert f"warning: cannot read {images}/{file}: " in output
    assert "cannot decode" not in output
    assert differences(plain, disturbed) == [] and records(plain) == records(disturbed)

    code, output, folder = started(
        "lost", f"1 open /train/{read_twice(images)} 2 100 {errno.ENOENT}"
    )
    assert code != 0 and not [
        line for line in output.splitlines() if line.startswith("[") and "Traceback" in line
    ], output
    error, *others = [line for line in output.splitlines() if "error: " in line]
    what = f"cannot read {images}/train/{read_twice(images)}: No such file or directory, tried 5 times in 15 s. Check"
    assert "error: rank 1 on " in error and what in error, output
    assert all("another worker is gone" in line for line in others), output
    assert load(str(folder / "last.pth.tar"))["epoch"] == 1
