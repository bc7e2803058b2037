"""What slurm/functions.sh gives to programs that cannot be run here, written down by stand-ins for them."""

import os
import subprocess

import pytest

from jobs import REPO

COMMAND = ["python", "-m", "job.train", "my data", "--out", "r"]


@pytest.fixture
def shell(tmp_path):
    """A function that runs lines after the functions, with programs that a test has written in place of the real ones."""

    def run(lines, programs=None, **variables):
        for name, text in (programs or {}).items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)} | variables
        script = f"set -euo pipefail\n. {REPO}/slurm/functions.sh\n{lines}"
        return subprocess.run(
            ["bash", "-c", script, "script", *COMMAND], env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    return run


def words(shell, tmp_path, **variables) -> list[str]:
    """The words that srun is started with."""
    (tmp_path / "my data").mkdir()
    (tmp_path / "r").mkdir()
    values = {"DATA": f"{tmp_path}/my data", "RUN": f"{tmp_path}/r", "IMAGE": "image", "MOUNTS": "/etc /nowhere"} | variables
    done = shell('start_tasks "$@"', {"srun": 'printf "%s\\n" "$@"'}, **values)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_home_folder_is_expanded_in_each_path_of_a_job(shell, tmp_path):
    names = ["DATA", "ARCHIVE", "LOCAL", "RUN", "IMAGE", "VENV"]
    home = {"HOME": f"{tmp_path}/my & home"}
    given = dict.fromkeys(names, "~/a b~/c") | {"MOUNTS": "~/a /b/~/c ~/d"}
    expected = ["$HOME/a b~/c"] * len(names) + ["$HOME/a /b/~/c $HOME/d", "absent"]
    done = shell('printf "%s\\n" "$DATA" "$ARCHIVE" "$LOCAL" "$RUN" "$IMAGE" "$VENV" "$MOUNTS" absent', **given, **home)
    assert done.stdout.splitlines() == [line.replace("$HOME", home["HOME"]) for line in expected], done.stderr
    assert shell('echo "${DATA-unset} ${RUN-unset}"', RUN="./~/r").stdout == "unset ./~/r\n"


@pytest.mark.parametrize("runtime", ["none", "docker", "apptainer", "pyxis"])
def test_the_training_command_is_the_same_in_each_runtime(shell, tmp_path, runtime):
    given = words(shell, tmp_path, RUNTIME=runtime, SLURM_CPUS_PER_TASK="8")
    assert given[:3] == ["--export=ALL", "--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert given[-len(COMMAND) :] == COMMAND
    between = given[3 : -len(COMMAND)]
    seen = f"{tmp_path}:{tmp_path}:ro,{tmp_path}/my data:{tmp_path}/my data:ro,/etc:/etc:ro,{tmp_path}/r:{tmp_path}/r"
    assert (
        between
        == {
            "none": [],
            "docker": ["bash", f"{REPO}/slurm/functions.sh", "in_docker"],
            "apptainer": ["apptainer", "exec", "--bind", seen, "--pwd", str(tmp_path), "image"],
            "pyxis": [
                "--container-image=image",
                f"--container-mounts={seen}",
                f"--container-workdir={tmp_path}",
                "--no-container-mount-home",
            ],
        }[runtime]
    )


def test_apptainer_sees_gpus_where_the_job_has_some(shell, tmp_path):
    given = words(shell, tmp_path, RUNTIME="apptainer", SLURM_JOB_GPUS="0,1")
    assert given[given.index("exec") + 1] == "--nv"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RUNTIME": "podman"}, "RUNTIME=podman: expected none, docker, apptainer or pyxis"),
        ({"RUNTIME": "none", "VENV": "nowhere"}, "VENV=nowhere is no virtual environment: make setup"),
    ],
)
def test_a_setting_that_is_wrong_is_one_line(shell, variables, said):
    done = shell('start_tasks "$@"', {"srun": "exit 1"}, **variables)
    assert (done.returncode, done.stderr) == (2, f"error: batch: {said}\n")


def test_addresses_that_other_machines_cannot_use_are_left_out(shell):
    """By number as SLURM has it; by name as it resolves, but to the machine itself or not at all."""
    nodes = {"node1": "10.0.0.1", "node2": "lan-name", "node3": "own-name", "node4": "nowhere", "node5": "127.0.0.1"}
    lines = "\n".join(
        f"NodeName={name} Arch=x86_64 CoresPerSocket=1 NodeAddr={address} NodeHostName=h Port=1"
        for name, address in nodes.items()
    )
    resolve = """case $2 in
        *.*) echo "$2 STREAM" ;;
        lan-name) echo "10.0.0.2 STREAM lan-name" ;;
        own-name) echo "127.0.1.1 STREAM own-name" ;;
        *) exit 2 ;;
    esac"""
    done = shell("node_addresses", {"scontrol": f"cat <<'END'\n{lines}\nEND", "getent": resolve}, SLURM_JOB_NODELIST="node[1-5]")
    assert (done.returncode, done.stdout) == (0, "node1=10.0.0.1 node2=10.0.0.2 node5=127.0.0.1 ")


def test_the_newest_checkpoint_is_found_on_a_disk_without_links(shell, linkless):
    """Beside it lie a copy, and half of another; and a job is requeued if there is a newer one than before."""

    def newest(folder):
        return shell("newest_checkpoint", RUN=str(folder)).stdout.strip()

    assert newest(linkless / "missing") == newest(linkless) == "none"
    for name in ("checkpoint_9999_000012", "checkpoint_10000_000000", "checkpoint_9999_000100", "last", "best"):
        (linkless / f"{name}.pth.tar").touch()
    (linkless / "checkpoint_10001_000000.pth.tar.new").touch()
    assert newest(linkless) == "checkpoint_10000_000000.pth.tar"
    needs = {"SLURM_JOB_ID": "7", "MAX_REQUEUES": "20", "RUN": str(linkless)}
    control = {"scontrol": """[ "$1" = requeue ] && echo "$*" || echo "JobId=7 JobState=RUNNING Reason=None\""""}
    ended = shell("settle 1 checkpoint_10000_000000.pth.tar", control, **needs)
    assert "not requeued: it ended before it saved anything new" in ended.stdout
    requeued = shell("settle 1 checkpoint_9999_000100.pth.tar", control, **needs)
    assert "newest checkpoint checkpoint_10000_000000.pth.tar)" in requeued.stdout and requeued.stdout.endswith("requeue 7\n")


@pytest.mark.parametrize("moment", ["while they start", "before their number is known"])
def test_tasks_that_did_not_hear_a_signal_are_told_again(shell, moment):
    """As srun loses one that comes while it starts them."""
    srun = """heard=0
    trap 'heard=$((heard + 1)); [ $heard = 1 ] || { echo "heard $heard"; exit 1; }' USR2
    touch ready
    [ -n "$UNKNOWN" ] || kill -USR2 $PPID
    for _ in $(seq 100); do sleep 0.1; done"""
    control = """[ "$1" = requeue ] && echo "$*" || echo "JobId=7 JobState=RUNNING Reason=None\""""
    unknown = moment == "before their number is known"
    before = """case $BASH_COMMAND in step=*) until [ -e ready ]; do sleep 0.1; done; kill -USR2 $$; esac"""
    told = f"set -T; trap '{before}' DEBUG; " if unknown else ""
    needs = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "MGD_NODE_ADDRESSES": "node1=10.0.0.1", "MAX_REQUEUES": "20"}
    variables = needs | {"RUN": "r", "DATA": "", "RUNTIME": "none", "VENV": "", "IMAGE": "", "MOUNTS": ""}
    done = shell(told + 'run "$@"', {"srun": srun, "scontrol": control}, **variables, UNKNOWN="1" if unknown else "")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "signal USR2: the tasks finish their step and save" in said[2]
    assert said[3] == "heard 2"
    assert "requeued, 1 of at most 20 times" in said[4]
    assert said[5] == "requeue 7"
