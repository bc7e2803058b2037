"""The main job, whole, in each runtime: an array whose runs are signalled and killed, with all its paths behind links."""

import shutil
import signal
import sys

import pytest
import yaml

from jobs import EPOCH, EPOCHS, REPO, SMALL, STEPS, TEACHER, BatchJob
from runs import differences, of_kind


@pytest.fixture(params=["none", "docker", "podman"])
def runtime(request):
    """The variables of a job that runs without a container, or in those of an engine."""
    if request.param == "none":
        return {}
    engine, image = (request.getfixturevalue(name) for name in (request.param, "image"))
    return {"RUNTIME": engine.name, "IMAGE": image, **engine.variables}


@pytest.fixture
def linked(images, teacher_file, tmp_path):
    """A folder /scratch -> /lustre of the test, with the data, the teacher, and a place for runs."""
    (tmp_path / "lustre").mkdir()
    (tmp_path / "scratch").symlink_to("lustre")
    shutil.copytree(images, tmp_path / "lustre/data")
    (tmp_path / "lustre/two words").mkdir()
    shutil.copy(teacher_file, tmp_path / "lustre/two words/teacher.pth.tar")
    return tmp_path / "scratch"


def test_main_job(slurm, submit, runtime, linked, undisturbed):
    """Each run of the array ends in the bytes of a run that nothing disturbs, and is requeued by itself.

    The last run that starts has the array's own number, by which SLURM would requeue all of it.
    """
    data, teacher = linked / "data", linked / "two words/teacher.pth.tar"
    array = {"script": "sweep.sbatch", "sbatch": ["--array=1,0%1", "--hold"], "RUN": ""}
    job = submit([*SMALL, *TEACHER, teacher], DATA=data, MOUNTS=teacher, **array, **runtime)
    folder = REPO / "runs" / f"mgd-sweep-{job.number}"
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(linked / folder.name)
    try:
        slurm("scontrol", "release", job.number)
        parts = [
            BatchJob(slurm, f"{job.number}_{number}", job.log, folder / str(number))
            for number in (0, 1)
        ]
        signalled, killed = parts  # the second starts when the first makes way
        signalled.wait_for_step(1)
        slurm("scancel", "--batch", "--signal=USR2", signalled.number)
        killed.wait_for_step(4)
        BatchJob(slurm, killed.shown("JobId"), job.log, killed.run).tasks()[1].send_signal(
            signal.SIGKILL
        )
        for part, factor in zip(parts, (10000, 1000), strict=True):
            part.wait("the run's end", (part.run / "complete").exists)
            options = yaml.safe_load((part.run / "config.yaml").read_text())
            assert (options["data"], options["teacher"]) == (str(data), str(teacher))  # as given
            assert part.steps() == list(range(1, STEPS + 1))
            assert part.shown("Restarts") == "1"
            assert differences(undisturbed(2, True, "--loss-factor", factor), part.run) == []
        job.wait(
            "the decision about each try", lambda: len(job.decisions()) == 4
        )  # it follows a run's end
        assert sorted(job.decisions()) == ["complete"] * 2 + ["requeued"] * 2
        assert [record["how"] for record in of_kind(signalled.run, "end")] == [
            "stopped",
            "complete",
        ]
        if not runtime:
            check_shown(slurm, job, folder, parts)
    finally:
        folder.unlink()


def check_shown(slurm, job, folder, parts):
    """Check what mgd-watch and mgd-report show of the array, by its folder and by the log that its runs share."""
    first, second = (of_kind(part.run, "step")[0]["distillation"] for part in parts)
    assert 9 < second / first < 11  # factors of 10000, and 1000
    for place in (folder, job.log):
        said = slurm(sys.executable, "-m", "job.show.watch", "--once", place, PYTHONPATH=REPO)
        for part, factor in zip(parts, ("10000.0", "1000.0"), strict=True):
            assert f"{part.number.replace('_', '/')}: done\n  loss_factor {factor}\n" in said
        assert (
            said.count(f"100 %, epoch {EPOCHS - 1} step {EPOCH}/{EPOCH}, of {EPOCHS} epochs") == 2
        )
        assert ("try 2 on " in said) == (place == job.log)
    said = slurm(
        sys.executable,
        "-m",
        "job.show.report",
        job.log,
        "--out",
        folder / "report.html",
        PYTHONPATH=REPO,
    )
    assert ", 2 runs; " in said
    seen = {path.name for path in (folder / "report-pictures").iterdir()}
    assert {f"maps-mgd-sweep-{job.number}-{number}-1.png" for number in (0, 1)} < seen
