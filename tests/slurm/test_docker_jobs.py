"""Tasks in containers of docker and podman, as jobs of SLURM and without SLURM."""

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from engine import PODMAN, missing, podman_settings
from jobs import REPO, SMALL
from short import short

USER = 4242  # a user id without a name and without ranges in /etc/subuid


def names(engine, job) -> list[str]:
    """Return the names of a job's containers, running or not."""
    arguments = ["--filter", f"label=mgd.job={job.number}", "--format", "{{.Names}}"]
    return engine("ps", "--all", *arguments).split()


@pytest.fixture
def submit_in(submit, image):
    """A function that submits the training job in containers, which must be gone at the end."""
    jobs = []

    def start(engine, **more):
        values = {"RUNTIME": engine.name, "IMAGE": image}
        jobs.append((engine, submit(SMALL, **values, **engine.variables, **more)))
        return jobs[-1][1]

    yield start
    for engine, job in jobs:
        job.slurm("scancel", job.number, check=False)
        job.wait("the end of its containers", lambda of=(engine, job): not names(*of), 60)


@pytest.mark.parametrize("containers", short(["docker", "podman"], "docker"), indirect=True)
def test_scancel_leaves_no_container(slurm, submit_in, containers):
    job = submit_in(containers)
    job.wait_for_step(1)
    expected = [f"mgd-{job.number}-{rank}-try-0" for rank in (0, 1)]
    assert sorted(names(containers, job)) == expected
    preflight = "^2 workers on 2 nodes, 1 of them on node1, launcher srun; .*; image moco-mgd:test$"
    assert re.search(preflight, job.text(), re.MULTILINE)
    slurm("scancel", job.number)
    job.wait("the end of its containers", lambda: not names(containers, job), 60)
    assert job.wait_for_end() == "CANCELLED"
    assert "requeued" not in job.decisions()


def test_killed_task_ends_its_container(submit_in, containers):
    """All processes of the task are killed at once, also the engine's client."""
    job = submit_in(containers, MAX_REQUEUES=0)
    job.wait_for_step(1)
    name = f"mgd-{job.number}-1-try-0"
    assert name in names(containers, job)
    ranks = {process: process.environ().get("SLURM_PROCID") for process in job.processes()}
    ours = [process for process, rank in ranks.items() if rank == "1" and not in_container(process)]
    # Not `tail`: SLURM may not find it without its parent.
    killed = [process for process in ours if process.name() != "tail"]
    assert any(containers.name in process.name() for process in killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    job.wait("the end of its container", lambda: name not in names(containers, job), 60)
    job.wait("a decision", job.decisions, 60)


def in_container(process) -> bool:
    """Return whether a process has its own mounts."""
    return os.readlink(f"/proc/{process.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")


@pytest.mark.short
def test_missing_image_is_one_line(submit_in, docker, tmp_path):
    prolog = tmp_path / "prolog.sh"
    change = 'echo "export IMAGE=moco-mgd:nowhere"'
    prolog.write_text(f'#!/bin/bash\nif [ "$SLURMD_NODENAME" = node2 ]; then {change}; fi\n')
    prolog.chmod(0o755)
    job = submit_in(docker, SLURM_TASK_PROLOG=prolog)
    job.wait("a decision", job.decisions, 60)
    errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
    start = "error: node2: rank 1: IMAGE=moco-mgd:nowhere: missing on this node (Error"
    assert len(errors) == 1 and errors[0].startswith(start), job.text()
    assert names(docker, job) == []
    assert job.wait_for_end() == "FAILED"


# Tasks without SLURM.


def task(function, *arguments, environment, folder, before=()):
    """Run a function of functions.sh as a task on a node and return its output.

    `folder`/run is the run's folder.
    """
    (folder / "run").mkdir(parents=True, exist_ok=True)
    settings = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_PROCID": "3", "SLURMD_NODENAME": "node1"}
    settings |= {"DATA": "", "RUN": f"{folder}/run"}
    command = [*before, "bash", folder / "slurm/functions.sh", function, *arguments]
    shutil.copytree(REPO / "slurm", folder / "slurm")  # for users who cannot read this repository
    options = dict(cwd=folder, capture_output=True, text=True, timeout=120)
    done = subprocess.run(command, env=environment | settings, **options)
    if done.returncode == NO_OVERLAY:
        pytest.skip("a /dev with InfiniBand needs root and a kernel with overlayfs")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_containers_of_earlier_tries_are_removed(containers, image, tmp_path):
    """Containers of other tasks of this try, and of other nodes, stay."""
    job = os.getpid()
    nodes = {
        f"mgd-{job}-1-try-0": "node1",
        f"mgd-{job}-0-try-1": "node1",
        f"mgd-{job}-2-try-1": "node2",
    }
    for name, node in nodes.items():
        arguments = ["--detach", "--rm", "--init", "--network=host", f"--name={name}"]
        arguments += [f"--label=mgd.job={job}", f"--label=mgd.node={node}"]
        containers("run", *arguments, image, "sleep", "600")
    try:
        environment = containers.environment | {
            "RUNTIME": containers.name,
            "IMAGE": image,
            "SLURM_RESTART_COUNT": "1",
        }
        output = task("in_container", "echo", "started", environment=environment, folder=tmp_path)
        line = r".* node1: removed container \S+ of an earlier try\nstarted\n"
        assert re.fullmatch(line, output)
        left = containers("ps", "--filter", f"label=mgd.job={job}", "--format", "{{.Names}}")
        assert sorted(left.split()) == [f"mgd-{job}-0-try-1", f"mgd-{job}-2-try-1"]
    finally:
        for name in nodes:
            containers("rm", "--force", name, check=False)


# Run a command with a /dev that has an InfiniBand device, and the message queues of most machines.
NO_OVERLAY = 77
WITH_INFINIBAND = f"""
mkdir -p "$0/infiniband" "$0/mqueue" && mknod -m 666 "$0/infiniband/uverbs0" c 1 3 &&
    mount -t overlay -o "lowerdir=$0:/dev" none /dev &&
    mount -t tmpfs -o mode=1777 none /dev/shm || exit {NO_OVERLAY}
exec "$@"
"""


def with_infiniband(folder):
    return ["unshare", "--mount", "bash", "-c", WITH_INFINIBAND, folder / "dev"]


@pytest.mark.short
def test_docker_passes_infiniband_on(tmp_path):
    """docker is a stand-in, because root of a sandbox may be unable to raise the limit."""
    (tmp_path / "docker").write_text('#!/bin/bash\n[ "$1" != run ] || printf "%s " "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    environment = os.environ | {
        "RUNTIME": "docker",
        "IMAGE": "image",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    arguments = "--device /dev/infiniband", "--ulimit memlock=-1"
    plain, with_device = (
        task("in_container", environment=environment, folder=folder, before=before)
        for folder, before in (
            ((tmp_path / "1"), ()),
            ((tmp_path / "2"), with_infiniband(tmp_path)),
        )
    )
    assert not any(word in plain for word in arguments) or Path("/dev/infiniband").exists()
    assert all(word in with_device for word in arguments)


LOOK = """
echo "user $(id -u), InfiniBand $(ls /dev/infiniband), $(ulimit -l) KiB to lock"
names='^(Cpus_allowed_list|CapBnd|NoNewPrivs):'
echo "$(grep -E "$names" /proc/self/status | cut -f 2 | paste -s -d ' ')"
touch "$1/mine"
"""


@pytest.fixture
def home():
    """A folder for USER whose parents are all accessible to this user."""
    folder = Path(tempfile.mkdtemp(prefix="mgd-user-"))
    folder.chmod(0o755)
    yield folder
    end_pause(folder)
    shutil.rmtree(folder)


def end_pause(folder):
    """End the process that keeps the namespaces of podman's first command for later commands."""
    file = folder / "libpod/tmp/pause.pid"
    if file.exists():
        os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink()


@pytest.mark.short
def test_podman_needs_no_root_and_no_subuid(docker, engine, home):
    """The user is root inside without capabilities, with the task's cores, limits and devices.

    The files that the task writes belong to the user.
    """
    if reason := missing(PODMAN):
        pytest.skip(reason)
    variables = podman_settings(home)
    with open(variables["CONTAINERS_STORAGE_CONF"], "a") as file:
        # The base has files of several users.
        file.write('[storage.options.overlay]\nignore_chown_errors = "true"\n')
    environment = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "PATH": os.environ["PATH"]}
    environment |= variables
    as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    (home / "run").mkdir()
    for path in (home, home / "run"):
        os.chown(path, USER, USER)
    base = engine["BASE_IMAGE"]
    docker("save", "--output", home / "base.tar", base)
    (home / "base.tar").chmod(0o644)
    load = ["podman", "load", "--quiet", "--input", home / "base.tar"]
    subprocess.run([*as_user, *load], env=environment, check=True)
    end_pause(home)

    before = [*with_infiniband(home), "taskset", "--cpu-list", "0", *as_user]
    environment |= {"RUNTIME": "podman", "IMAGE": base}
    arguments = ["sh", "-c", LOOK, "sh", f"{home}/run"]
    output = task("in_container", *arguments, environment=environment, folder=home, before=before)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit = "unlimited" if limit == resource.RLIM_INFINITY else limit // 1024
    assert output == f"user 0, InfiniBand uverbs0, {limit} KiB to lock\n{'0' * 16} 1 0\n"
    assert (home / "run/mine").stat().st_uid == USER
