"""Runs on images without labels: a folder, a list and shards together."""

import shutil

import pytest
from runs import differences, of_kind

from job.pack import main

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp --aug-plus".split()
SMALL += "--save-every 2steps --keep 9".split()


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory):
    """A flat folder, a list and shards, each with 50 images without labels."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "flat").mkdir()
    for path in sorted((images / "train").rglob("*.*")):
        shutil.copy(path, folder / "flat" / f"{path.parent.name}-{path.name}")
    names = sorted(path.name for path in (folder / "flat").iterdir())
    (folder / "list.txt").write_text("".join(f"flat/{name}\n" for name in reversed(names)))
    main([str(folder / "flat"), str(folder / "packed"), "--shard-images", "7"])
    return [folder / "flat", folder / "list.txt", folder / "packed"]


def test_killed_run_resumes_to_the_same_bytes(start_job, sources, tmp_path):
    """The uninterrupted run has no loader processes."""
    options = [*sources, *SMALL]
    reference = start_job(2, tmp_path / "reference", [*options, "-j", 0])
    output = reference.finish()
    assert reference.process.returncode == 0, output
    [start], [hint] = of_kind(reference.folder, "start"), of_kind(reference.folder, "hint")
    assert (start["images"], hint["id"]) == (150, "unlabelled")
    options += ["-j", 1, "--resume", "auto"]
    job = start_job(2, tmp_path / "run", options)
    job.wait_for_step(3)
    job.kill()
    assert len(job.steps()) < len(reference.steps())
    resumed = start_job(2, tmp_path / "run", options)
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    assert len(of_kind(resumed.folder, "resumed")) == 1
    assert differences(reference.folder, resumed.folder) == []
