"""The main job in each runtime: an array with links in its paths, signalled and killed."""

import shutil
import signal
import sys

import pytest
import yaml

from jobs import EPOCH, EPOCHS, REPO, SMALL, STEPS, TEACHER, BatchJob
from runs import differences, of_kind


@pytest.fixture(params=[pytest.param("none", marks=pytest.mark.short), "docker", "podman"])
def runtime(request):
    """The variables of a job, without containers or in an engine's containers."""
    if request.param == "none":
        return {}
    engine, image = (request.getfixturevalue(name) for name in (request.param, "image"))
    return {"RUNTIME": engine.name, "IMAGE": image, **engine.variables}


@pytest.fixture
def linked(images, teacher_file, tmp_path):
    """A link /scratch -> /lustre in the test's folder, with the data and the teacher."""
    (tmp_path / "lustre").mkdir()
    (tmp_path / "scratch").symlink_to("lustre")
    shutil.copytree(images, tmp_path / "lustre/data")
    (tmp_path / "lustre/two words").mkdir()
    shutil.copy(teacher_file, tmp_path / "lustre/two words/teacher.pth.tar")
    return tmp_path / "scratch"


def test_main_job(slurm, submit, runtime, linked, undisturbed):
    """Each run of the array ends in the bytes of an uninterrupted run, and is requeued separately.

    The last run to start has the array's own number, by which SLURM would requeue all of them.
    """
    data, teacher = linked / "data", linked / "two words/teacher.pth.tar"
    array = {"script": "sweep.sbatch", "sbatch": ["--array=1,0%1", "--hold"], "RUN": ""}
    job = submit([*SMALL, *TEACHER, teacher], DATA=data, MOUNTS=teacher, **array, **runtime)
    folder = REPO / "runs" / f"mgd-sweep-{job.number}"
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(linked / folder.name)
    try:
        slurm("scontrol", "release", job.number)
        ids = {number: f"{job.number}_{number}" for number in (0, 1)}
        tasks = [BatchJob(slurm, ids[number], job.log, folder / str(number)) for number in ids]
        signalled, killed = tasks  # the second starts when the first is requeued
        signalled.wait_for_step(1)
        slurm("scancel", "--batch", "--signal=USR2", signalled.number)
        killed.wait_for_step(4)
        by_id = BatchJob(slurm, killed.shown("JobId"), job.log, killed.run)
        by_id.tasks()[1].send_signal(signal.SIGKILL)
        for task, factor in zip(tasks, (10000, 1000), strict=True):
            task.wait("the run's end", (task.run / "complete").exists)
            options = yaml.safe_load((task.run / "config.yaml").read_text())
            assert (options["data"], options["teacher"]) == (str(data), str(teacher))  # as given
            assert task.steps() == list(range(1, STEPS + 1))
            assert task.shown("Restarts") == "1"
            assert differences(undisturbed(2, True, "--loss-factor", factor), task.run) == []
        # The last decision follows the run's end.
        job.wait("the decision about each try", lambda: len(job.decisions()) == 4)
        assert sorted(job.decisions()) == ["complete"] * 2 + ["requeued"] * 2
        ends = [record["how"] for record in of_kind(signalled.run, "end")]
        assert ends == ["stopped", "complete"]
        if not runtime:
            check_views(slurm, job, folder, tasks)
    finally:
        folder.unlink()


def check_views(slurm, job, folder, tasks):
    """Check mgd-watch and mgd-report on the array, by its folder and by the log of all its runs."""
    first, second = (of_kind(task.run, "step")[0]["distillation"] for task in tasks)
    assert 9 < second / first < 11  # factors of 10000 and 1000
    program = [sys.executable, "-m"]
    for path in (folder, job.log):
        output = slurm(*program, "job.show.watch", "--once", path, PYTHONPATH=REPO)
        for task, factor in zip(tasks, ("10000.0", "1000.0"), strict=True):
            assert f"{task.number.replace('_', '/')}: done\n  loss_factor {factor}\n" in output
        end = f"100 %, epoch {EPOCHS - 1} step {EPOCH}/{EPOCH}, of {EPOCHS} epochs"
        assert output.count(end) == 2
        assert ("try 2 on " in output) == (path == job.log)
    report = folder / "report.html"
    output = slurm(*program, "job.show.report", job.log, "--out", report, PYTHONPATH=REPO)
    assert ", 2 runs; " in output
    pictures = {path.name for path in (folder / "report-pictures").iterdir()}
    assert {f"maps-mgd-sweep-{job.number}-{number}-1.png" for number in (0, 1)} < pictures
