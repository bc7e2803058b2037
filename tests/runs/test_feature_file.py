"""Training from a file of features that job.embed writes, instead of from the teacher's network."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from job.data.folders import scan
from runs import differences, of_kind

SMALL = "-a resnet18 --stem small --width 16 --image-size 32 --batch-size 8 --epochs 2".split()
SMALL += "--framework none --weak-views --warmup-epochs 0 --save-every 2steps -j 1".split()
EMBED = "--image-size 32 -j 0 --max-bad-images 1".split()


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """The images, and an undecodable one."""
    folder = shutil.copytree(images, tmp_path_factory.mktemp("data") / "images")
    (folder / "train" / "class0" / "12.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def features(start_job, data, narrow_teacher, tmp_path_factory):
    """The file of the features of all images."""
    out = tmp_path_factory.mktemp("features") / "teacher.npy"
    finish(start_job(2, out, [data, "--pretrained", narrow_teacher, *EMBED], "job.embed"))
    return out


def finish(job):
    output = job.finish()
    assert job.process.returncode == 0, output
    return output


def options(data, features, *more):
    return [data, *SMALL, "--max-bad-images", 1, "--teacher", features, *more]


@pytest.mark.short
@pytest.mark.parametrize("workers", [2, 4])
def test_killed_run_resumes_to_the_same_bytes(start_job, data, features, tmp_path, workers):
    argv = options(data, features, "--distill", "simreg", "similarity", "--similarity-k", 16)
    argv += ["--similarity", "compress", "--accumulate", 2 if workers == 2 else 1]
    reference = start_job(workers, tmp_path / "reference", argv)
    output = finish(reference)
    assert f"teacher {features}: 58 rows of 256 features (resnet18, pooled after" in output
    killed = start_job(workers, tmp_path / "run", argv)
    killed.wait_for_step(3)
    killed.kill()
    resumed = start_job(workers, tmp_path / "run", [*argv, "--resume", "auto"])
    finish(resumed)
    assert resumed.steps() == list(range(1, 13))
    assert differences(reference.folder, resumed.folder) == []


def test_resume_refuses_another_file(start_job, data, features, tmp_path):
    """A file at another place with the same content is the same teacher."""
    copied, changed = tmp_path / "copied.npy", tmp_path / "changed.npy"
    rows = np.load(features)
    np.save(copied, rows)
    rows[7] += 1
    np.save(changed, rows)
    for copy in (copied, changed):
        shutil.copy(features.with_suffix(".json"), copy.with_suffix(".json"))
    argv = ["--distill", "simreg", "--epochs", 1]
    finish(start_job(1, tmp_path / "run", options(data, features, *argv)))
    argv = ["--distill", "simreg", "--resume", "auto"]
    refused = start_job(2, tmp_path / "run", options(data, changed, *argv))
    output = refused.finish()
    assert refused.process.returncode == 2
    assert f"error: --teacher {changed}: content of SHA-256 " in output
    finish(start_job(2, tmp_path / "run", options(data, copied, *argv)))
    [first, second] = of_kind(tmp_path / "run", "teacher")
    assert first == second | {"time": first["time"], "path": str(features)}
    assert first["arch"] == "features of resnet18"
    command = [sys.executable, "-m", "job.export", tmp_path / "run" / "last.pth.tar"]
    subprocess.run([*command, tmp_path / "model.onnx"], check=True, timeout=300)
    card = (tmp_path / "model.md").read_text()
    assert "- Teacher: `features of resnet18` from `copied.npy`, digest `" in card


def test_worker_without_a_row_prints_the_error(start_job, data, features, tmp_path):
    """The image was undecodable for job.embed. Only rank 1 reads it."""
    repaired = shutil.copytree(data, tmp_path / "images")
    image = repaired / "train" / "class0" / "12.png"
    shutil.copy(image.with_name("0.png"), image)
    images = scan(str(repaired), "train")
    index, batch, steps = images.names.all().index("class0/12.png"), 8, 6
    seed = next(
        seed
        for seed in range(99)
        if index in images.order(seed, 0, batch)[: steps * batch].reshape(steps, 2, -1)[:, 1]
    )
    argv = ["--distill", "simreg", "--loss-share", 0, "--loss-factor", 1, "--seed", seed]
    job = start_job(2, tmp_path / "run", options(repaired, features, *argv))
    output = job.finish()
    assert job.process.returncode == 2
    first = next((line for line in output.splitlines() if "error: " in line), output)
    assert "error: rank 1 on " in first
    assert f"--teacher {features}: no row for {image}, which job.embed could not decode" in first
