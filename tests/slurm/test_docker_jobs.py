"""SLURM jobs whose tasks run in containers of a real Docker engine."""

import re
import signal

import pytest
import yaml

from jobs import SMALL, STEPS
from runs import differences, records


@pytest.fixture
def submit_docker(submit, docker, image, tmp_path, teacher_file):
    """A function that submits the training job in containers; none of the job's own may be left at the end."""
    jobs = []

    def start(arguments=SMALL, **more):
        values = {"RUNTIME": "docker", "IMAGE": image, "DOCKER_HOST": docker.engine["DOCKER_HOST"]}
        jobs.append(submit(arguments, **values | {"MOUNTS": teacher_file.parent} | more))
        return jobs[-1]

    yield start
    for job in jobs:
        job.slurm("scancel", job.number, check=False)
        job.wait("the end of its containers", lambda job=job: not containers(docker, job), 60)


def containers(docker, job) -> list[str]:
    """The names of a job's containers, running or not."""
    return docker("ps", "--all", "--filter", f"label=mgd.job={job.number}", "--format", "{{.Names}}").split()


def check_whole(job, undisturbed, teacher=False):
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert job.steps() == list(range(1, STEPS + 1))
    assert differences(undisturbed(2, teacher), job.run) == []


@pytest.fixture
def behind_links(images, teacher_file, tmp_path):
    """A folder /scratch that is a link, as on many clusters, with the data, the teacher and a place for runs behind it."""
    disk = tmp_path / "lustre"
    (disk / "two words").mkdir(parents=True)
    (disk / "runs").mkdir()
    (disk / "data").symlink_to(images)
    (disk / "two words" / "teacher.pth.tar").symlink_to(teacher_file)
    (disk / "more.yaml").write_text("keep: 9\n")
    (tmp_path / "scratch").symlink_to("lustre")
    return tmp_path / "scratch"


def test_a_job_in_containers_trains_to_the_same_digits_as_outside(submit_docker, docker, undisturbed, teacher_file, behind_links):
    """Each of its paths leads through a link, and is written down as it was given."""
    teacher, more = behind_links / "two words/teacher.pth.tar", behind_links / "more.yaml"
    settings = {"DATA": behind_links / "data", "MOUNTS": f"{teacher.parent}\n{more}\n{teacher_file.parent}"}
    arguments = [*SMALL, "--teacher", teacher, "--config", more]
    job = submit_docker(arguments, run=behind_links / "runs/1", **settings)
    job.wait_for_step(1)
    assert sorted(containers(docker, job)) == [f"mgd-{job.number}-0-try-0", f"mgd-{job.number}-1-try-0"]
    check_whole(job, undisturbed, teacher=True)
    assert records(job.run) == records(undisturbed(2, teacher=True))
    options = yaml.safe_load((job.run / "config.yaml").read_text())
    assert (options["data"], options["teacher"]) == (str(settings["DATA"]), str(teacher))
    assert re.search(r"^2 workers on 2 nodes, 1 of them on node1, by srun; .*; image moco-mgd:test$", job.text(), re.MULTILINE)
    assert containers(docker, job) == []


def test_a_signal_reaches_the_containers_and_the_next_try_goes_on(slurm, submit_docker, undisturbed):
    job = submit_docker([*SMALL, "--save-every", 1])
    job.wait_for_step(1)
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    job.wait_for_line("stopped by a signal")
    check_whole(job, undisturbed)
    assert job.text().count("requeued, 1 of at most") == 1
    assert "removed container" not in job.text()


def test_scancel_leaves_no_container(slurm, submit_docker, docker):
    job = submit_docker()
    job.wait_for_step(1)
    slurm("scancel", job.number)
    assert job.wait("the end of its containers", lambda: not containers(docker, job), 60) < 40
    assert job.wait_for_end() == "CANCELLED"
    assert "requeued, 1" not in job.text()


def test_a_killed_task_s_container_ends_with_it(submit_docker, docker):
    """All that SLURM has started for the task dies at once, the docker client too: nobody tells the container."""
    job = submit_docker(MAX_REQUEUES=0)
    job.wait_for_step(1)
    name = f"mgd-{job.number}-1-try-0"
    assert name in containers(docker, job)
    of_rank = {process: process.environ().get("SLURM_PROCID") for process in job.processes()}
    killed = [process for process, rank in of_rank.items() if rank == "1"]
    assert any("docker" in process.name() for process in killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    assert job.wait("the end of its container", lambda: name not in containers(docker, job), 60) < 15
    job.wait_for_line("not requeued: ", seconds=60)


def test_a_container_of_an_earlier_try_is_removed_before_the_start(slurm, submit_docker, docker, image, undisturbed):
    job = submit_docker(sbatch=["--hold"])
    labels = [f"--label=mgd.{name}={value}" for name, value in (("job", job.number), ("node", "node2"), ("try", "earlier"))]
    docker("run", "--detach", "--rm", "--name", "an-orphan", "--network=host", *labels, image, "sleep", "600")
    other = docker("run", "--detach", "--rm", "--name", "another-s", "--network=host", "--label=mgd.job=0", image, "sleep", "600")
    slurm("scontrol", "release", job.number)
    job.wait_for_step(1)
    assert "an-orphan" not in containers(docker, job)
    assert re.search(r"node2: removed container \S+ of an earlier try", job.text())
    assert docker("ps", "--quiet", "--no-trunc", "--filter", "name=another-s") == other
    docker("rm", "--force", "another-s")
    check_whole(job, undisturbed)


def test_an_image_that_one_node_does_not_have_is_what_one_reads(submit_docker, docker, tmp_path):
    prolog = tmp_path / "prolog.sh"
    prolog.write_text('#!/bin/bash\nif [ "$SLURMD_NODENAME" = node2 ]; then echo "export IMAGE=moco-mgd:nowhere"; fi\n')
    prolog.chmod(0o755)
    job = submit_docker(SLURM_TASK_PROLOG=prolog)
    job.wait_for_line("not requeued: ", seconds=60)
    errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
    said = "error: node2: rank 1: no image 'moco-mgd:nowhere' here: docker pull or docker load it on every node (Error"
    assert len(errors) == 1 and errors[0].startswith(said), job.text()
    assert containers(docker, job) == []
    assert job.wait_for_end() == "FAILED"


def test_a_killed_worker_in_a_container_ends_the_try_and_the_next_one_goes_on(submit_docker, docker, undisturbed):
    job = submit_docker()
    job.wait_for_step(4)
    docker("kill", "--signal=KILL", f"mgd-{job.number}-1-try-0")
    assert job.wait_for_line("requeued, 1 of at most") < 60
    assert re.search(r"srun: error: node2: task 1: Exited with exit code 137", job.text())
    check_whole(job, undisturbed)
