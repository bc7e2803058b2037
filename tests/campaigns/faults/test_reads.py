"""Failing reads of images in real runs: no other image is used, and the bytes stay the same."""

import errno

import pytest

from inject import injected
from job.data.folders import TrainingOrder, scan
from job.checkpoints.folder import load
from runs import differences, records

RUN = "-a resnet18 --width 16 --image-size 16 --batch-size 10 --moco-k 20 --moco-dim 16".split()
RUN += "--mlp -j 1 --epochs 2 --keep 1".split()
RUN += "--print-freq 1 --mgd-images 40 --refresh-epochs 1 --knn-every 1".split()
# The first try of each process fails.
TEMPORARY = [
    f"* open /train/class0/4.png 1 1 {errno.ESTALE}",
    f"* read /train/class1/7.png 1 1 {errno.EIO}",
    f"* open /val/class0/52.png 1 1 {errno.EACCES}",
]


def read_twice(images):
    """Return the name of the first image that rank 1 reads in both epochs."""
    scanned = scan(str(images), "train")
    order = TrainingOrder(scanned, 10, rank=1, size=2, seed=0, epochs=2)
    draws = [draw for batch in order for draw in batch]
    first, second = ({index for epoch, index in draws if epoch == number} for number in (0, 1))
    return scanned.names[min(first & second)]


@pytest.fixture
def run(start_job, images, teacher_file, tmp_path, monkeypatch):
    """A function that runs two workers under faults. It returns exit code, output and folder."""

    def to_end(name, *rules):
        with monkeypatch.context() as context:
            for variable, value in injected(*rules).items() if rules else ():
                context.setenv(variable, value)
            job = start_job(2, tmp_path / name, [images, *RUN, "--teacher", teacher_file])
        output = job.finish()
        return job.process.returncode, output, tmp_path / name

    return to_end


def test_failing_reads_change_no_byte(run, images):
    """Temporary failures in refreshes, k-NN and training, and a permanent one."""
    code, output, plain = run("plain")
    assert code == 0, output
    code, output, disturbed = run("disturbed", *TEMPORARY)
    assert code == 0, output
    for file in ("train/class0/4.png", "train/class1/7.png", "val/class0/52.png"):
        assert f"warning: cannot read {images}/{file}: " in output
    assert "cannot decode" not in output
    assert differences(plain, disturbed) == [] and records(plain) == records(disturbed)

    name = read_twice(images)
    code, output, folder = run("lost", f"1 open /train/{name} 2 100 {errno.ENOENT}")
    of_workers = [line for line in output.splitlines() if line.startswith("[")]
    assert code != 0 and not any("Traceback" in line for line in of_workers), output
    error, *others = [line for line in output.splitlines() if "error: " in line]
    expected = f"cannot read {images}/train/{name}: No such file or directory"
    expected += ", tried 5 times in 15 s. Check"
    assert "error: rank 1 on " in error and expected in error, output
    assert all("another worker is gone" in line for line in others), output
    assert load(str(folder / "last.pth.tar"))["epoch"] == 1
