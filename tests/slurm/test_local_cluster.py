"""The cluster of slurm/local-cluster.sh: it comes up, it leaves nothing behind, and it touches nothing else."""

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
    """The exit code of the script, and all that it said."""
    env = os.environ | {"LOCAL_CLUSTER": str(folder)} | env
    run = subprocess.run(
        [shutil.which("bash"), SCRIPT, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.returncode, run.stdout + run.stderr


def on(folder, *command):
    env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, timeout=60, cwd=folder
    ).stdout


def living(folder):
    """What was started by the cluster in this folder or runs on it: names by pid."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/slurm.conf".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "comm").read_text().strip()
    return found


def waited_for(state):
    """The value of `state()` once it is true."""
    until = time.monotonic() + 30
    while not (value := state()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return value


@pytest.fixture
def folder(tmp_path):
    """A folder whose path is too long for a socket in it."""
    folder = tmp_path / ("long" * 25)
    yield folder
    assert cluster(folder, "down") == (0, "local-cluster: down\n")


@slurm
def test_cluster_runs_tasks_and_leaves_no_process(folder):
    assert cluster(folder, "status") == (3, "local-cluster: not up\n")
    code, said = cluster(folder, "up")
    assert code == 0 and f"\n  export SLURM_CONF={folder}/slurm.conf\n" in said
    code, status = cluster(folder, "status")
    assert code == 0
    code, said = cluster(folder, "up")
    assert code == 0 and said.startswith("local-cluster: already up, with 2 nodes\n")
    assert cluster(folder, "status") == (0, status)
    tasks = on(folder, "srun", "--nodes=2", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert sorted(tasks.split()) == ["node1", "node1", "node2", "node2"]

    script = folder / "job.sh"
    script.write_text("#!/bin/sh\nsrun sh -c \"trap '' TERM; sleep 1000; true\"\n")
    on(folder, "sbatch", "--nodes=2", "--ntasks=2", script)
    waited_for(lambda: list(living(folder).values()).count("sleep") == 2)
    assert set(living(folder).values()) >= {"munged", "slurmctld", "slurmd", "slurmstepd"}
    assert cluster(folder, "down") == (0, "local-cluster: down\n")
    assert living(folder) == {}
    assert cluster(folder, "status")[0] == 3


@slurm
def test_cluster_partly_gone_is_taken_down(folder):
    assert cluster(folder, "up", "1")[0] == 0
    pid_file = folder / "run" / "slurmctld.pid"
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    waited_for(lambda: pid not in living(folder))
    stranger = subprocess.Popen(
        [sys.executable, "-c", "input()", "slurmctld"], stdin=subprocess.PIPE
    )
    pid_file.write_text(f"{stranger.pid}\n")
    code, said = cluster(folder, "up")
    assert code == 2 and "only munged node1 still runs. Run slurm/local-cluster.sh down" in said
    assert cluster(folder, "down") == (0, "local-cluster: down\n")
    assert living(folder) == {}
    assert stranger.poll() is None
    stranger.communicate(b"\n")


def test_missing_programs_are_one_line(tmp_path):
    for tool in ("cat", "dirname", "readlink", "realpath"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    code, said = cluster(tmp_path / "cluster", "up", PATH=str(tmp_path))
    assert code == 2 and said.count("\n") == 1
    assert "sinfo" in said and said.endswith(
        "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge\n"
    )


@slurm
def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "log").write_text("mine")
    said = f"local-cluster: {tmp_path}: other files in it; expected an empty folder. Set LOCAL_CLUSTER to one\n"
    assert cluster(tmp_path, "up") == (2, said)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@slurm
def test_mistakes_are_one_line(folder):
    assert cluster(folder, "up", "0") == (
        2,
        "local-cluster: '0': expected a number of nodes from 1 to 99\n",
    )
    code, said = cluster(folder.parent / "a b", "up")
    assert code == 2 and said.count("\n") == 1
    assert cluster(folder, "sideways")[1].startswith("slurm/local-cluster.sh up [NODES]")
