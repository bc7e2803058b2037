"""Runs on packed images."""

import pytest
from runs import differences, of_kind

from job.pack import main

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp".split()
SMALL += "--aug-plus --knn-every 1 --refresh-epochs 0,1 --save-every 2steps --keep 9".split()
STEPS = 2 * (50 // 8)


def packed(data, out, *options):
    main([str(data), str(out), *map(str, options)])
    return out


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The images of a folder in shards of 7."""
    return packed(images, tmp_path_factory.mktemp("packed") / "out", "--shard-images", 7)


def test_killed_run_resumes_to_the_same_bytes(start_job, shards, teacher_file, tmp_path):
    options = [shards, *SMALL, "--teacher", teacher_file]
    reference = start_job(2, tmp_path / "reference", [*options, "-j", 0])
    output = reference.finish()
    assert reference.process.returncode == 0, output
    assert [record["knn_images"] for record in of_kind(reference.folder, "knn")] == [9, 9]
    options += ["-j", 1, "--resume", "auto"]
    job = start_job(2, tmp_path / "run", options)
    job.wait_for_step(3)
    job.kill()
    assert len(job.steps()) < STEPS
    resumed = start_job(2, tmp_path / "run", options)
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    assert len(of_kind(resumed.folder, "resumed")) == 1
    assert resumed.steps() == list(range(1, STEPS + 1))
    assert differences(reference.folder, resumed.folder) == []


def test_accuracies_of_shards_are_the_folder_s(start_job, images, shards, tmp_path):
    """k-NN and linear accuracies do not depend on the order of the images."""
    sources = {"folder": images, "packed": shards}
    logged = {name: [] for name in sources}
    for options in (["--knn"], ["--epochs", 1, "--batch-size", 50, "--lr", 0]):
        options = ["-a", "resnet18", "--image-size", 32, "-j", 0, *options]
        jobs = {
            name: start_job(1, tmp_path / name, [data, *options], "job.linear")
            for name, data in sources.items()
        }
        for name, job in jobs.items():
            output = job.finish()
            assert job.process.returncode == 0, output
            lines = [
                line.partition("val: ")[2] for line in output.splitlines() if "9 images of" in line
            ]
            logged[name].append([line.partition(" among ")[0] for line in lines])
    assert logged["packed"] == logged["folder"]
    assert [len(lines) for lines in logged["packed"]] == [1, 1]
