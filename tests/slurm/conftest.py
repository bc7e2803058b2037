"""A real SLURM of two nodes on this machine, jobs on it, and the runs under horovodrun that they are compared with."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import build, containers, docker, engine, image, podman  # noqa: F401 (fixtures)
from jobs import REPO, SMALL, TEACHER, BatchJob

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"], "/usr/sbin", "/sbin"])


def pytest_collection_modifyitems(items):
    absent = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    slurm = f"no {', '.join(absent)} here: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    for item in items:
        if absent and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=slurm))


@pytest.fixture(scope="session")
def slurm():
    """A function that runs one of SLURM's commands on the cluster of two nodes and returns what it prints."""
    folder = tempfile.mkdtemp(prefix="mgd-slurm-")
    environment = os.environ | {
        "LOCAL_CLUSTER": folder,
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": PATH,
    }
    environment = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("HOROVOD_", "MGD_"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "USER": "tester"}

    def command(*words, check=True, **more):
        done = subprocess.run(
            [str(word) for word in words],
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
    """A function that submits a script; what a test leaves running is cancelled, and may leave no process."""
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
        exported = ",".join(
            [
                "HOME",
                "USER",
                "CUDA_VISIBLE_DEVICES",
                *(f"{name}={value}" for name, value in values.items()),
            ]
        )
        words = [
            f"--nodes={nodes}",
            f"--ntasks-per-node={tasks_per_node}",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            *sbatch,
        ]
        words += [f"--export={exported}", f"--output={log}", REPO / "slurm" / script, *arguments]
        jobs.append(BatchJob(slurm, slurm("sbatch", "--parsable", *words).strip(), log, run))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm("scancel", job.number, check=False)
        job.wait("the end of all its processes", lambda job=job: not job.processes(), 45)


@pytest.fixture(scope="session")
def undisturbed(start_job, images, teacher_file, tmp_path_factory):
    """A function (N, whether with a teacher, more options) -> folder of a run of N workers under horovodrun."""
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
