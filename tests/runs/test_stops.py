"""Signals to one of two workers in a k-NN, refresh, calibration or validation."""

import re
import signal

import numpy as np
import pytest
from PIL import Image

from inject import injected
from runs import differences, of_kind, records

COMMON = "--image-size 16 --batch-size 32 --epochs 2 -j 0 --stem small --width 16".split()
COMMON += "--keep 9 --resume auto".split()
TRAIN = "-a resnet18 --moco-k 40 --mlp --moco-t 0.2 --cos --knn-every 1".split()
TRAIN += "--refresh-epochs every:1 --loss-share 0.5".split()
STEPS = 5  # of an epoch
# For a k-NN or validation, worker 1 opens 64 and then 8 validation images. It opens 64 training
# images for the k-NN, and twice 32 for a refresh and for the loss factor.
VALIDATION, TRAINING = (
    f"1 open /{split}/ {{}} 1 -{signal.SIGTERM:d}" for split in ("val", "train")
)
INCOMPLETE = "error: stopped by a signal: no accuracy is computed. Start the command again"

# For sitecustomize.py: worker 1 gets a signal at its end, as from a launcher that is late.
LATE = """
import atexit, os, signal
if os.environ.get("HOROVOD_RANK") == "1":
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """160 training and 200 validation images of noise: 2 or 3 batches per pass and worker."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(360):
        split = "train" if number < 160 else "val"
        path = folder / split / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def run_job(start_job, monkeypatch, tmp_path):
    """A function that runs two workers, with a fault and a late signal, or with neither.

    It returns the output.
    """
    (tmp_path / "sitecustomize.py").write_text(LATE)

    def run(program, folder, arguments, fault=""):
        variables = injected(fault) | {"PYTHONPATH": str(tmp_path)} if fault else {}
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            job = start_job(2, folder, arguments, program)
        output = job.finish()
        if "--knn" in arguments:
            assert job.process.returncode == 1 and output.count(INCOMPLETE) == 1, output
        else:
            assert job.process.returncode == 0, output
            assert of_kind(folder, "end")[-1]["how"] == ("stopped" if fault else "complete"), output
            assert (folder / "complete").exists() == (not fault)
        return output

    return run


def newest(folder):
    """Return name, inode and time of the newest checkpoint."""
    path = sorted(folder.glob("checkpoint_*"))[-1]
    return path.name, path.stat().st_ino, path.stat().st_mtime_ns


def kinds(folder):
    """Return the numbers of a run's records of five kinds."""
    names = ("step", "refresh", "factor", "knn", "validation")
    return [len(of_kind(folder, kind)) for kind in names]


def test_train_stopped_between_epochs(run_job, images, narrow_teacher, tmp_path):
    """A stop in any work between epochs allows no further step and saves the epoch's end once.

    The resumed run ends with the bytes of an uninterrupted one.
    """
    arguments = [images, *COMMON, *TRAIN, "--teacher", narrow_teacher]
    reference, folder = tmp_path / "reference", tmp_path / "run"
    run_job("job.train", reference, arguments)
    arguments += ["--save-every", 10]

    output = run_job("job.train", folder, arguments, TRAINING.format(70))
    assert re.search(r"measuring: (\d+) of \1 batches", output)  # all of the refresh
    assert kinds(folder) == [0] * 5 and not list(folder.glob("checkpoint_*"))  # in the factor

    run_job("job.train", folder, arguments, VALIDATION.format(1))
    assert kinds(folder) == [STEPS, 4, 1, 0, 0]  # in the k-NN
    saved = newest(folder)
    assert saved[0] == "checkpoint_0001_000000.pth.tar"
    assert differences(reference, folder, saved[0]) == []

    run_job("job.train", folder, arguments, TRAINING.format(70))
    assert kinds(folder) == [STEPS, 4, 1, 1, 0] and newest(folder) == saved  # in the refresh

    run_job("job.train", folder, arguments, VALIDATION.format(80))
    assert kinds(folder) == [2 * STEPS, 8, 1, 1, 0]  # in the last k-NN
    assert newest(folder)[0] == "checkpoint_0002_000000.pth.tar"

    run_job("job.train", folder, arguments)
    assert differences(reference, folder) == []
    assert records(folder) == records(reference)


def test_linear_stopped_in_its_validation(run_job, images, tmp_path):
    """The resumed run validates again."""
    arguments = [images, *COMMON, "--schedule", 1, "--lr", 0.3]
    reference, folder = tmp_path / "reference", tmp_path / "run"
    run_job("job.linear", reference, arguments)
    arguments += ["--save-every", 10]

    run_job("job.linear", folder, arguments, VALIDATION.format(1))
    assert kinds(folder) == [STEPS, 0, 0, 0, 0]
    saved = newest(folder)
    assert saved[0] == f"checkpoint_0000_{STEPS:06d}.pth.tar"

    run_job("job.linear", folder, arguments, VALIDATION.format(1))
    assert kinds(folder) == [STEPS, 0, 0, 0, 0] and newest(folder) == saved

    run_job("job.linear", folder, arguments)
    assert differences(reference, folder) == differences(reference, folder, "best.pth.tar") == []
    assert records(folder) == records(reference)


def test_stopped_knn_reports_no_accuracy(run_job, images, tmp_path):
    arguments = [images, "--image-size", 16, "-j", 0, "--stem", "small", "--width", 16, "--knn"]
    output = run_job("job.linear", tmp_path / "run", arguments, VALIDATION.format(1))
    assert "k-NN accuracy" not in output
