"""Fixtures of runs for several modules. All tests of this folder are marked `run`."""

from pathlib import Path

import pytest

from runs import write_teacher


@pytest.fixture(scope="session")
def narrow_teacher(tmp_path_factory):
    """A teacher file: a narrow ResNet-18 with the small stem and random weights."""
    path = tmp_path_factory.mktemp("narrow") / "teacher.pth.tar"
    return write_teacher(path, "resnet18", stem="small", width=32)


# Two epochs, each with a refresh and a k-NN, and checkpoints within them
SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp".split()
SMALL += "--moco-t 0.2 --warmup-epochs 0 --refresh-epochs 0,1 --knn-every 1".split()
SMALL += "--save-every 3steps --check-every 3 -j 0 --seed 3".split()
LINEAR = "--epochs 2 --batch-size 10 --lr 0.3 --schedule 1 -j 0".split()


@pytest.fixture(scope="session")
def folders(start_job, images, teacher_file, tmp_path_factory):
    """The folders of a run with a teacher, and of a linear run on its features. Do not change them.

    Both have two workers. The second is named so that `job.export` finds it.
    """
    folder = tmp_path_factory.mktemp("runs")
    run, linear = folder / "run", folder / "run-linear"
    pretrained = ["--pretrained", run / "last.pth.tar"]
    for out, options, program in (
        (run, [*SMALL, "--teacher", teacher_file], "job.train"),
        (linear, [*LINEAR, *pretrained], "job.linear"),
    ):
        job = start_job(2, out, [images, *options], program)
        output = job.finish()
        assert job.process.returncode == 0, output
    return run, linear


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.run)
