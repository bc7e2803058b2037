"""Sockets of loader processes, under any TMPDIR."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# One worker with a loader process.
PROGRAM = """
import tempfile
from multiprocessing import util
from pathlib import Path
from batches import SIZE, write_numbered
from job.data.loader import Batches
from job.data.views import CentreViews
from job.cluster import exits, launch

if __name__ == "__main__":
    with exits.reported_errors():
        launch.start({})
        [(_, labels, _)] = Batches(CentreViews(write_numbered(Path("data")), SIZE), [[3, 10]], 1)
        print(labels.tolist(), util.get_temp_dir(), tempfile.gettempdir())
"""

# In a mount namespace: a writable folder, and read-only folders for temporary files.
READ_ONLY = """set -e
mount -t tmpfs tmpfs "$0"
mkdir "$0/$LONG"
for folder in /tmp /var/tmp /dev/shm; do
    mount --rbind "$folder" "$folder"
    mount -o remount,bind,ro "$folder"
done
cd /proc
exec "$@"
"""
SHORTEN = """
from job.errors import RunError
from job.cluster.sockets import shorten_paths
try:
    shorten_paths()
except RunError as error:
    print(error)
"""


@pytest.fixture
def start(tmp_path):
    """A function that runs PROGRAM with a TMPDIR."""

    def run(folder):
        (tmp_path / "program.py").write_text(PROGRAM)
        environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, tmp_path / "program.py"]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )

    return run


def test_sockets_are_elsewhere_if_tmpdir_is_long(start, tmp_path):
    folder = tmp_path / ("ü" * 60) / ("y" * 100)  # sockets count bytes
    folder.mkdir(parents=True)
    done = start(folder)
    assert done.returncode == 0, done.stderr
    labels, sockets, files = done.stdout.splitlines()[-1].rsplit(" ", 2)
    assert labels == "[0, 1]"
    assert files == str(folder)
    assert sockets.startswith("/tmp/pymp-") and not os.path.exists(sockets)  # removed at the end
    assert list(folder.iterdir()) == []


def test_missing_tmpdir_is_ignored(start, tmp_path):
    done = start(tmp_path / "missing")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("[0, 1] /tmp/pymp-")


def test_machine_without_a_folder_for_sockets(tmp_path):
    long = "y" * 100

    def error(tmpdir):
        environment = os.environ | {"TMPDIR": tmpdir, "LONG": long}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = ["unshare", "-m", "sh", "-c", READ_ONLY, tmp_path, sys.executable, "-c", SHORTEN]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "ermi" in done.stderr:
            pytest.skip(f"mounting is not allowed here, run as root: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    line = error("/dev/null/x")
    assert line.startswith("TMPDIR: No usable temporary directory found in ['/dev/null/x', ")
    assert line.endswith("; expected a writable folder. Set TMPDIR to one\n")
    assert error(str(tmp_path)) == ""
    assert error(f"{tmp_path}/{long}") == (
        f"TMPDIR {tmp_path}/{long}: too long for sockets, and /tmp, /var/tmp, /dev/shm are not "
        "writable; expected at most 75 bytes. Set TMPDIR to a shorter path\n"
    )
