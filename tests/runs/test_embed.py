"""job.embed: the same bytes with any number of workers, and after a kill."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

IMAGES, TRAIN = 300, 260  # 5 groups and 1
SIZE = 24  # pixels
# For sitecustomize.py: rank 0 stops itself before it writes the rows of its fourth group.
STOP = """
import os, signal, sys

if "job.embed" in " ".join(sys.orig_argv) and os.environ.get("HOROVOD_RANK") == "0":
    from job.evaluate import rows

    append = rows.Rows.append

    def stopping(self, *group):
        if len(self.journal) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        append(self, *group)

    rows.Rows.append = stopping
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """260 training and 40 validation images of noise. One is undecodable."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(1)
    for number in range(IMAGES):
        split = "train" if number < TRAIN else "val"
        path = folder / split / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 60)).save(path)
    (folder / "train" / "class1" / "099.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def start(start_job, many, narrow_teacher):
    """A function that starts the program."""

    def begin(workers, out, *options):
        argv = [many, "--pretrained", narrow_teacher, "--image-size", SIZE, "-j", 0, *options]
        return start_job(workers, out, argv, "job.embed")

    return begin


def finished(job):
    """Wait until a job has succeeded. Return its output and its files' contents."""
    output = job.finish()
    assert job.process.returncode == 0, output
    return output, contents(job.folder)


def contents(out):
    return [path.read_bytes() for path in (out, out.with_suffix(".json")) if path.exists()]


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The features of one worker."""
    out = tmp_path_factory.mktemp("reference") / "features.npy"
    finished(start(1, out))
    return out


@pytest.fixture
def paused(start, tmp_path, monkeypatch):
    """A function that starts the program. It returns the job and rank 0 when this has stopped."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STOP)

    def begin(workers, out):
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
            job = start(workers, out)
        return job, job.wait_for_pause()

    return begin


def done_groups(out):
    journal = out.with_name(f"{out.name}.part") / "groups.jsonl"
    return journal.read_bytes().count(b"\n")


@pytest.mark.short
def test_bytes_of_two_workers_equal_one_s(start, reference, tmp_path):
    _, actual = finished(start(2, tmp_path / "features.npy"))
    assert len(actual) == 2 and actual == contents(reference)
    about = json.loads(actual[1])
    assert np.load(reference).shape == (IMAGES - 1, 256) and len(about["paths"]) == IMAGES - 1
    assert about["undecodable"] == [["train/class1/099.png", "no image of a known format"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.json", "features.npy"]


def test_killed_program_resumes_to_the_same_bytes(paused, start, reference, many, tmp_path):
    """It resumes on fewer workers and skips the images of complete groups, even a damaged one."""
    out = tmp_path / "features.npy"
    job, _ = paused(2, out)
    job.kill()
    assert done_groups(out) == 3 and not contents(out)
    first = many / "train" / "class0" / "000.png"
    content = first.read_bytes()
    first.write_bytes(b"no image")
    try:
        output, actual = finished(start(1, out))
    finally:
        first.write_bytes(content)
    assert f"resuming: 192 of {IMAGES} images are done" in output
    assert actual == contents(reference)


def test_stopped_program_resumes(paused, start, reference, tmp_path):
    out = tmp_path / "features.npy"
    job, worker = paused(1, out)
    worker.send_signal(signal.SIGTERM)
    worker.resume()
    output = job.finish()
    assert job.process.returncode != 0
    assert output.count("error: ") == 1 and "stopped by a signal" in output
    assert "The same command resumes" in output
    assert done_groups(out) == 5 and not contents(out)  # the stop travels during the next group
    output, actual = finished(start(1, out))
    assert "resuming: 260 of 300" in output and actual == contents(reference)
