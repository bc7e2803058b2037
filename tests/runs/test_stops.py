"""Whole runs that get a signal at a chosen image of a k-NN, refresh, loss factor or validation, on one worker of two."""

import re
import signal

import numpy as np
import pytest
from PIL import Image

from inject import injected
from runs import differences, of_kind, records

COMMON = "--image-size 16 --batch-size 32 --epochs 2 -j 0 --stem small --width 16 --keep 9 --resume auto".split()
TRAIN = "-a resnet18 --moco-k 40 --mlp --moco-t 0.2 --cos --knn-every 1 --refresh-epochs every:1 --loss-share 0.5".split()
STEPS = 5  # of an epoch
# For a k-NN or validation, worker 1 opens 64 and then 8 validation images. It opens 64 training images for the k-NN,
# and twice 32 for a refresh and for the loss factor.
VALIDATION, TRAINING = (
    f"1 open /{split}/ {{}} 1 -{signal.SIGTERM:d}" for split in ("val", "train")
)
INCOMPLETE = "error: stopped by a signal: no accuracy is computed. Start the command again"

# As sitecustomize.py: worker 1 gets a signal at its very end, as from a launcher that passes one on late.
LATE = """
import atexit, os, signal
if os.environ.get("HOROVOD_RANK") == "1":
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """160 training and 200 validation images of noise: two or three batches of each pass for a worker."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(360):
        path = (
            folder
            / ("train" if number < 160 else "val")
            / f"class{number % 2}"
            / f"{number:03d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def run_job(start_job, monkeypatch, tmp_path):
    """A function that runs a program on two workers, with a fault and a late signal or without; it returns the output."""
    (tmp_path / "sitecustomize.py").write_text(LATE)

    def run(program, folder, arguments, fault=""):
        with monkeypatch.context() as patch:
            for name, value in (
                (injected(fault) | {"PYTHONPATH": str(tmp_path)}).items() if fault else ()
            ):
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


def position(folder):
    """Name, inode and time of the newest checkpoint."""
    path = sorted(folder.glob("checkpoint_*"))[-1]
    return path.name, path.stat().st_ino, path.stat().st_mtime_ns


def kinds(folder):
    """How many records a run has of steps, refreshed stages, loss factors, k-NN and validation accuracies."""
    return [
        len(of_kind(folder, kind)) for kind in ("step", "refresh", "factor", "knn", "validation")
    ]


def test_a_training_run_stopped_in_each_work_between_epochs_resumes_to_the_same_bytes(
    run_job, images, narrow_teacher, tmp_path
):
    """No step is done after the signal. The end of the epoch is saved, once."""
    arguments = [images, *COMMON, *TRAIN, "--teacher", narrow_teacher]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run_job("job.train", whole, arguments)
    arguments += ["--save-every", 10]

    output = run_job("job.train", folder, arguments, TRAINING.format(70))
    assert re.search(r"measuring: (\d+) of \1 batches", output)  # all of the refresh
    assert kinds(folder) == [0] * 5 and not list(folder.glob("checkpoint_*"))  # in the factor

    run_job("job.train", folder, arguments, VALIDATION.format(1))
    assert kinds(folder) == [STEPS, 4, 1, 0, 0]  # in the k-NN
    saved = position(folder)
    assert (
        saved[0] == "checkpoint_0001_000000.pth.tar" and differences(whole, folder, saved[0]) == []
    )

    run_job("job.train", folder, arguments, TRAINING.format(70))
    assert kinds(folder) == [STEPS, 4, 1, 1, 0] and position(folder) == saved  # in the refresh

    run_job("job.train", folder, arguments, VALIDATION.format(80))
    assert kinds(folder) == [2 * STEPS, 8, 1, 1, 0]  # in the last k-NN
    assert position(folder)[0] == "checkpoint_0002_000000.pth.tar"

    run_job("job.train", folder, arguments)
    assert differences(whole, folder) == []
    assert records(folder) == records(whole)


def test_a_classifier_stopped_in_its_validation_validates_again(run_job, images, tmp_path):
    arguments = [images, *COMMON, "--schedule", 1, "--lr", 0.3]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run_job("job.linear", whole, arguments)
    arguments += ["--save-every", 10]

    run_job("job.linear", folder, arguments, VALIDATION.format(1))
    assert kinds(folder) == [STEPS, 0, 0, 0, 0]
    saved = position(folder)
    assert saved[0] == f"checkpoint_0000_{STEPS:06d}.pth.tar"

    run_job("job.linear", folder, arguments, VALIDATION.format(1))
    assert kinds(folder) == [STEPS, 0, 0, 0, 0] and position(folder) == saved

    run_job("job.linear", folder, arguments)
    assert differences(whole, folder) == differences(whole, folder, "best.pth.tar") == []
    assert records(folder) == records(whole)


def test_a_k_nn_accuracy_that_is_stopped_is_not_reported(run_job, images, tmp_path):
    arguments = [images, "--image-size", 16, "-j", 0, "--stem", "small", "--width", 16, "--knn"]
    output = run_job("job.linear", tmp_path / "run", arguments, VALIDATION.format(1))
    assert "k-NN accuracy" not in output
