"""Ends and requeues of short jobs on a real SLURM. Their commands are lines of shell."""

import os
import subprocess

import pytest

from jobs import REPO

# A job script of this project, with a test's own command.
SCRIPT = """#!/bin/bash
set -euo pipefail
VENV='' RUNTIME=none MAX_REQUEUES=5
: "${{LOCAL=}}" "${{ARCHIVE=}}" "${{IMAGE=}}" "${{MOUNTS=}}"
. slurm/functions.sh
stage
run bash -c '{command}'
"""
COMPLETE = 'touch "$RUN/complete"'


@pytest.fixture
def submit_command(submit, tmp_path):
    """A function that submits a job with one task, a line of shell."""

    def start(command, sbatch=(), **variables):
        script = tmp_path / "command.sbatch"
        script.write_text(SCRIPT.format(command=command))
        options = ["--open-mode=append", "--requeue", *sbatch]
        return submit([], nodes=1, script=script, sbatch=options, **variables)

    return start


@pytest.fixture
def controller(slurm):
    """A function that stops or starts SLURM's controller, which runs at the end of a test."""
    command = ["slurmctld", "-f", slurm.folder / "slurm.conf"]

    def switch(on):
        if on:
            environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin"}
            with (slurm.folder / "log/slurmctld.log").open("a") as log:
                subprocess.run(command, env=environment, stderr=log, check=True)
        else:
            os.kill(int((slurm.folder / "run/slurmctld.pid").read_text()), 15)

    yield switch
    if "is UP" not in slurm("scontrol", "ping", check=False):
        switch(on=True)


@pytest.mark.parametrize("end", ["a finished run", "a requeue"])
def test_job_ends_while_the_controller_is_down(submit_command, controller, tmp_path, end):
    """A finished run needs no controller. A requeue waits for it."""
    wait = f"touch {tmp_path}/started; until [ -e {tmp_path}/down ]; do sleep 0.1; done"
    saved = "$RUN/checkpoint_0001_000000.pth.tar"
    again = f"[ -e {saved} ] || {{ touch {saved}; exit 1; }}"
    requeued = end == "a requeue"
    job = submit_command(f"{wait}; {again if requeued else 'true'}; {COMPLETE}")
    job.wait("the task", (tmp_path / "started").exists)
    controller(on=False)
    (tmp_path / "down").touch()
    if requeued:
        job.wait_for_line("srun: error: node1: task 0: Exited with exit code 1")
    else:
        job.wait_for_decision("complete")
        job.wait("the end of all its processes", lambda: not job.processes())
    controller(on=True)
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert job.decisions() == ["requeued"] * requeued + ["complete"]
    assert requeued or "error" not in job.text()


def test_two_signalled_tries_end_the_job(slurm, submit_command, tmp_path):
    """The archive is a pipe without data, so each try stages until its end."""
    archive = tmp_path / "photos.tar"
    os.mkfifo(archive)
    job = submit_command("true", ARCHIVE=archive, LOCAL=tmp_path / "local", DATA="")
    for number, signal in enumerate(("HUP", "USR2"), 1):
        job.wait_for_line("data: copying", times=number)
        slurm("scancel", "--batch", f"--signal={signal}", job.number)
    assert job.wait_for_end() == "FAILED"
    assert job.decisions() == ["requeued", "nothing-saved-twice"]
    assert job.shown("Restarts") == "1"


@pytest.mark.short
def test_job_script_errors_are_one_line(slurm, tmp_path):
    for script, arguments, line in [
        (
            "sweep",
            ["--array=7"],
            "--array 7: no such line in the table; expected 0 to 4. Change --array or add a line",
        ),
        (
            "train",
            [":", "-n1"],
            "a heterogeneous job of 2 components; expected one. Submit it without ':' and 'hetjob'",
        ),
    ]:
        log = tmp_path / f"{script}.log"
        small = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1".split()
        small += [f"--output={log}", "--export=PATH,VENV="]
        slurm("sbatch", "--wait", *small, *arguments, REPO / f"slurm/{script}.sbatch", check=False)
        assert log.read_text() == f"error: node1: {line}\n"


@pytest.fixture
def repository(tmp_path):
    """A repository with the job scripts and an environment whose Python prints its variables."""
    top = tmp_path / "my repository"
    (top / ".venv/bin").mkdir(parents=True)
    (top / ".venv/bin/activate").write_text(f'PATH="{top}/.venv/bin:$PATH"\n')
    names = "PYTHONPATH PYTHONHOME HOROVOD_RANK NCCL_DEBUG LD_LIBRARY_PATH DATA RUN".split()
    lines = "\n".join(f'echo "{name} ${{{name}-}}"' for name in names)
    (top / ".venv/bin/python").write_text(
        f'#!/bin/bash\n{lines}\necho "PWD $PWD"\necho done >"$RUN/complete"\n'
    )
    (top / ".venv/bin/python").chmod(0o755)
    (top / "slurm").mkdir()
    for file in (REPO / "slurm").iterdir():
        (top / "slurm" / file.name).write_bytes(file.read_bytes())
    return top


@pytest.mark.parametrize("export", ["", "ALL"])
def test_job_of_another_folder_finds_its_repository(slurm, repository, tmp_path, export):
    """Its relative paths begin at the folder of submission. Harmful variables are dropped."""
    folder = tmp_path / "my work"
    (folder / "my data").mkdir(parents=True)
    small = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --output=log --wait"
    given = f"--export={export}" if export else ""
    script = f"{repository}/slurm/train.sbatch"
    shell = {"PYTHONPATH": "/x", "PYTHONHOME": "/x", "HOROVOD_RANK": "1", "HOROVOD_SIZE": "9"}
    shell |= {"NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/site/lib"}
    shell |= {"DATA": "my data", "RUN": "my run"}
    command = f'cd "{folder}"; sbatch {small} {given} "{script}" a.sbatch'
    slurm("bash", "-c", command, check=False, **shell)
    text = (folder / "log").read_text()
    [run] = folder.glob("my run" if export else "runs/mgd-train-*")
    assert f"PWD {folder}\n" in text and f"PYTHONPATH {repository}\n" in text
    assert "PYTHONHOME \n" in text and "HOROVOD_RANK \n" in text
    assert "LD_LIBRARY_PATH /site/lib\n" in text
    assert "NCCL_DEBUG INFO\n" in text and ("DATA my data\n" in text) == bool(export)
    assert (run / "complete").exists()


@pytest.mark.short
def test_job_without_a_repository_is_one_line(slurm, tmp_path):
    options = "--wait --gpus-per-node=0 --cpus-per-task=1 --output=log"
    command = f"cd {tmp_path}; sbatch {options} <{REPO}/slurm/linear.sbatch"
    slurm("bash", "-c", command, check=False)
    line = f"error: no slurm/functions.sh in {tmp_path}; expected the repository. "
    assert (tmp_path / "log").read_text() == f"{line}Submit a script of its slurm/\n"
