"""The data set as an archive, unpacked on each node's own disk."""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = """#!/bin/bash
set -euo pipefail
LOCAL={folder}/local
. slurm/functions.sh
stage
say "data is $DATA"
[ ! -e {folder}/requeue ] || {{ rm {folder}/requeue; scontrol requeue "$SLURM_JOB_ID"; sleep 60; }}
"""


@pytest.fixture
def stage(submit, tmp_path):
    """A function that submits a job which stages an archive, and does nothing else but be requeued, once, if asked to."""

    def start(archive, requeue=False):
        if requeue:
            (tmp_path / "requeue").touch()
        script = tmp_path / "stage.sbatch"
        script.write_text(SCRIPT.format(folder=tmp_path))
        return submit([], script=script, sbatch=["--open-mode=append", "--requeue"], ARCHIVE=archive, DATA="")

    return start


@pytest.fixture
def archives(images, tmp_path):
    """A function that packs the images under a folder of their own: tar, tar.gz or sqsh."""

    def pack(kind):
        path = tmp_path / f"photos.{kind}"
        if kind == "sqsh":
            if not shutil.which("mksquashfs"):
                pytest.skip("no mksquashfs here: apt-get install squashfs-tools")
            subprocess.run(["mksquashfs", images, path, "-quiet", "-no-progress"], check=True)
        else:
            with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as archive:
                archive.add(images, "photos")
        return path

    return pack


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "sqsh"])
def test_an_archive_is_unpacked_once_and_found_again_after_a_requeue(stage, archives, images, tmp_path, kind):
    """Both nodes are this machine: the second finds what the first has unpacked, as it would be after a requeue."""
    archive = archives(kind)
    path = tmp_path / f"photos.{kind}.sha256"
    path.write_text(f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  photos.{kind}\n")
    job = stage(archive, requeue=True)
    job.wait_for_line("data is ", times=2)
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert job.text().count("verified") == 1
    assert job.text().count("is here already") == 3
    data = job.text().rsplit("data is ", 1)[1].strip()
    files = lambda folder: {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.png")}  # noqa: E731
    assert files(Path(data)) == files(images)
    assert list((tmp_path / "local").glob("*.part")) == []


def test_a_copy_with_another_checksum_is_refused(stage, archives, tmp_path):
    archive = archives("tar")
    (tmp_path / "photos.tar.sha256").write_text("0" * 64 + "  photos.tar\n")
    job = stage(archive)
    assert job.wait_for_end() == "FAILED"
    assert "error: node" in job.text() and f"expected {'0' * 64}: copy it anew" in job.text()
    assert "data is" not in job.text()


@pytest.mark.parametrize(
    ("name", "said"), [("missing.tar", "cannot be read"), ("noise.tar", "cannot unpack"), ("empty.tar", "has no folder train")]
)
def test_an_archive_that_is_none_is_refused(stage, tmp_path, name, said):
    if name == "noise.tar":
        (tmp_path / name).write_bytes(b"noise" * 1000)
    if name == "empty.tar":
        tarfile.open(tmp_path / name, "w").close()
    job = stage(tmp_path / name)
    assert job.wait_for_end() == "FAILED"
    assert said in job.text()
    assert "data is" not in job.text()
