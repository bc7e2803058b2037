"""Fixtures: a real SLURM of two nodes on this machine, its jobs, and runs under horovodrun."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import build, builder, containers, docker, engine, image, podman  # noqa: F401 (fixtures)
from jobs import REPO, SMALL, TEACHER, BatchJob

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"], "/usr/sbin", "/sbin"])


def pytest_collection_modifyitems(items):
    absent = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    reason = f"no {', '.join(absent)}. Run "
    reason += "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    for item in items:
        if absent and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm():
    """A function that runs a SLURM command on a cluster of two nodes and returns its output."""
    folder = tempfile.mkdtemp(prefix="mgd-slurm-")
    dropped = ("HOROVOD_", "MGD_")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(dropped)
    }
    environment |= {"LOCAL_CLUSTER": folder, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "USER": "tester"}

    def command(*arguments, check=True, **more):
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env=environment | more,
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command(REPO / "slurm/local-cluster.sh", "up", 2)
    command.folder = Path(folder)
    yield command
    command(REPO / "slurm/local-cluster.sh", "down")
    shutil.rmtree(folder)


@pytest.fixture
def submit(slurm, images, tmp_path):
    """A function that submits a script. At the end, cancelled jobs must leave no process."""
    jobs = []

    def start(
        arguments,
        nodes=2,
        tasks_per_node=1,
        script="train.sbatch",
        sbatch=(),
        run=None,
        **variables,
    ):
        number = len(jobs)
        log, run = tmp_path / f"log{number}.txt", run or tmp_path / f"run{number}"
        values = {
            "DATA": images,
            "RUN": run,
            "VENV": "",
            "PATH": PATH,
            "OMP_NUM_THREADS": 1,
        } | variables
        given = [f"{name}={value}" for name, value in values.items()]
        exported = ",".join(["HOME", "USER", "CUDA_VISIBLE_DEVICES", *given])
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node}"]
        options += ["--gpus-per-node=0", "--cpus-per-task=1", *sbatch]
        options += [f"--export={exported}", f"--output={log}", REPO / "slurm" / script, *arguments]
        jobs.append(BatchJob(slurm, slurm("sbatch", "--parsable", *options).strip(), log, run))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm("scancel", job.number, check=False)
        job.wait("the end of all its processes", lambda job=job: not job.processes(), 45)


@pytest.fixture(scope="session")
def undisturbed(start_job, images, teacher_file, tmp_path_factory):
    """A function that returns the folder of an uninterrupted run of some workers by horovodrun."""
    runs = {}

    def run(workers, teacher=False, *more, options=SMALL):
        key = (workers, teacher, *options, *more)
        if key not in runs:
            folder = tmp_path_factory.mktemp("horovodrun") / "run"
            distilled = [*TEACHER, teacher_file] if teacher else []
            given = [images, "--config", "imagenet", *options, *distilled, *more]
            job = start_job(workers, folder, given)
            output = job.finish()
            assert job.process.returncode == 0, output
            runs[key] = folder
        return runs[key]

    return run
