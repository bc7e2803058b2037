"""slurm/local-cluster.sh: it starts and stops a cluster, and affects no other process."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "local-cluster.sh"

slurm = pytest.mark.skipif(
    not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"), reason="no SLURM here"
)


def cluster(folder, *arguments, **env):
    """Run the script and return its exit code and its output."""
    env = os.environ | {"LOCAL_CLUSTER": str(folder)} | env
    command = [shutil.which("bash"), SCRIPT, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def on(folder, *command):
    env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, timeout=60, cwd=folder
    ).stdout


def living(folder):
    """Return the daemons and jobs of the cluster in a folder: process names by pid."""
    processes = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/slurm.conf".encode() in (process / "environ").read_bytes():
                processes[int(process.name)] = (process / "comm").read_text().strip()
    return processes


def wait_for(state):
    """Wait until `state()` is true."""
    until = time.monotonic() + 30
    while not state():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def folder(tmp_path):
    """A folder whose path is too long for a socket in it."""
    folder = tmp_path / ("long" * 25)
    yield folder
    assert cluster(folder, "down") == (0, "local-cluster: down\n")


@slurm
@pytest.mark.short
def test_cluster_runs_tasks_and_leaves_no_process(folder):
    assert cluster(folder, "status") == (3, "local-cluster: not up\n")
    code, output = cluster(folder, "up")
    assert code == 0 and f"\n  export SLURM_CONF={folder}/slurm.conf\n" in output
    code, status = cluster(folder, "status")
    assert code == 0
    code, output = cluster(folder, "up")
    assert code == 0 and output.startswith("local-cluster: already up, with 2 nodes\n")
    assert cluster(folder, "status") == (0, status)
    tasks = on(folder, "srun", "--nodes=2", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert sorted(tasks.split()) == ["node1", "node1", "node2", "node2"]

    script = folder / "job.sh"
    script.write_text("#!/bin/sh\nsrun sh -c \"trap '' TERM; sleep 1000; true\"\n")
    on(folder, "sbatch", "--nodes=2", "--ntasks=2", script)
    wait_for(lambda: list(living(folder).values()).count("sleep") == 2)
    assert set(living(folder).values()) >= {"munged", "slurmctld", "slurmd", "slurmstepd"}
    assert cluster(folder, "down") == (0, "local-cluster: down\n")
    assert living(folder) == {}
    assert cluster(folder, "status")[0] == 3


@slurm
def test_cluster_without_a_daemon_is_stopped(folder):
    assert cluster(folder, "up", "1")[0] == 0
    pid_file = folder / "run" / "slurmctld.pid"
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in living(folder))
    other = subprocess.Popen([sys.executable, "-c", "input()", "slurmctld"], stdin=subprocess.PIPE)
    pid_file.write_text(f"{other.pid}\n")
    code, output = cluster(folder, "up")
    assert code == 2 and "only munged node1 still runs. Run slurm/local-cluster.sh down" in output
    assert cluster(folder, "down") == (0, "local-cluster: down\n")
    assert living(folder) == {}
    assert other.poll() is None
    other.communicate(b"\n")


@pytest.mark.short
def test_missing_programs_are_one_line(tmp_path):
    for tool in ("cat", "dirname", "readlink", "realpath"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    code, output = cluster(tmp_path / "cluster", "up", PATH=str(tmp_path))
    assert code == 2 and output.count("\n") == 1
    assert "sinfo" in output and output.endswith(
        "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge\n"
    )


@slurm
def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "log").write_text("mine")
    error = "other files in it; expected an empty folder. Set LOCAL_CLUSTER to one"
    assert cluster(tmp_path, "up") == (2, f"local-cluster: {tmp_path}: {error}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@slurm
def test_mistakes_are_one_line(folder):
    assert cluster(folder, "up", "0") == (
        2,
        "local-cluster: '0': expected a number of nodes from 1 to 99\n",
    )
    code, output = cluster(folder.parent / "a b", "up")
    assert code == 2 and output.count("\n") == 1
    assert cluster(folder, "sideways")[1].startswith("slurm/local-cluster.sh up [NODES]")
