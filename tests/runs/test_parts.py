"""Frameworks and distillers in the training loop: toy ones, all distillers, SimSiam, none."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inject import injected
from job.checkpoints.foreign import read_backbone
from job.show.report import app as report
from runs import check_steps, differences, of_kind, records

SMALL = "-a resnet18 --stem small --width 16 --image-size 16 --batch-size 8 --epochs 2".split()
SMALL += "--cos --warmup-epochs 0 -j 0 --lr 0.003".split()
SMALL += "--save-every 2steps --keep 99 --resume auto --check-every 4".split()
WEIGHTS = {"mgd": 1, "projector": 1, "gram": 0.5, "simreg": 1, "similarity": 1, "disco": 1}
POOLED = "--similarity seed --similarity-k 20 --head-width 32".split()
DISTILLED = ["--refresh-epochs", "0,1", "--loss-share", 0.5]
EPOCH = 50 // 8  # steps
STEPS = 2 * EPOCH
# Worker 1 opens 18 training images for a pass over all images, 4 for a step, 0 for a loss factor.
BEFORE_EPOCH_1 = 2 * 18 + 4 * EPOCH
IN_SECOND_DISTILLER = f"1 open /train/ {BEFORE_EPOCH_1 + 18 + 5} 1 -{signal.SIGTERM:d}"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Workers can import the program `toys`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), prepend=os.pathsep)


def finished(job):
    output = job.finish()
    assert job.process.returncode == 0, output
    return output


def check_resume(start_job, workers, folder, options, position):
    """Do a run, resume it in another folder from its checkpoint at (epoch, step), compare both.

    Return the folder of the uninterrupted run.
    """
    reference = start_job(workers, folder / "reference", options)
    finished(reference)
    (folder / "run").mkdir()
    name = "checkpoint_{:04d}_{:06d}.pth.tar".format(*position)
    os.link(reference.folder / name, folder / "run" / name)
    resumed = start_job(workers, folder / "run", options)
    finished(resumed)
    [record] = of_kind(resumed.folder, "resumed")
    assert (record["epoch"], record["step"]) == position
    assert differences(reference.folder, resumed.folder) == []
    return reference.folder


def check_kill(start_job, folder, options):
    """Do a run of two workers, kill and resume another after step 3, and compare both.

    Return the folder and the output of the uninterrupted run.
    """
    reference = start_job(2, folder / "reference", options)
    output = finished(reference)
    killed = start_job(2, folder / "run", options)
    killed.wait_for_step(3)
    killed.kill()
    assert len(killed.steps()) < STEPS
    resumed = start_job(2, folder / "run", options)
    finished(resumed)
    [record] = of_kind(resumed.folder, "resumed")
    assert record["step"] > 0 and resumed.steps() == list(range(1, STEPS + 1))
    assert differences(reference.folder, resumed.folder) == []
    assert records(resumed.folder) == records(reference.folder)
    return reference.folder, output


def panel(folder):
    """Return the output of `mgd-watch --once`."""
    command = [sys.executable, "-m", "job.show.watch", "--once", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_toy_framework_with_two_distillers(
    start_job, images, narrow_teacher, tmp_path, monkeypatch
):
    """It resumes to the same bytes after a signal and after a kill.

    The signal is sent while the second distiller prepares, the kill within an epoch. Each distiller
    has half of --loss-share. The program does not name the toys.
    """
    options = [images, *SMALL, "--framework", "toy", "--teacher", narrow_teacher, *DISTILLED]
    options += ["--distill", "mgd", "toy"]
    reference = start_job(2, tmp_path / "reference", options, "toys")
    finished(reference)
    with monkeypatch.context() as patch:
        for name, value in injected(IN_SECOND_DISTILLER).items():
            patch.setenv(name, value)
        stopped = start_job(2, tmp_path / "run", options, "toys")
    output = finished(stopped)
    # mgd has measured.
    assert re.search(r"epoch 0 mean.*measuring: (\d+) of \1 batches", output, re.DOTALL)
    assert stopped.steps() == list(range(1, EPOCH + 1))
    expected = [record for record in records(reference.folder) if record["epoch"] == 0]
    assert records(stopped.folder) == expected
    killed = start_job(2, tmp_path / "run", options, "toys")
    killed.wait_for_step(EPOCH + 3)
    killed.kill()
    assert len(killed.steps()) < STEPS
    resumed = start_job(2, tmp_path / "run", options, "toys")
    finished(resumed)
    positions = [(one["epoch"], one["step"]) for one in of_kind(resumed.folder, "resumed")]
    assert positions[0] == (1, 0) and len(positions) == 2
    assert resumed.steps() == list(range(1, STEPS + 1))
    assert differences(reference.folder, resumed.folder) == []
    assert records(reference.folder) == records(resumed.folder)

    first, last = (
        torch.load(reference.folder / name, weights_only=True)
        for name in ("checkpoint_0000_000002.pth.tar", "last.pth.tar")
    )
    trained = [("state_dict", "module.guess.weight")]
    trained += [("toy", "projector.weight"), ("mgd", "bn4.weight")]
    assert not any(torch.equal(first[key][name], last[key][name]) for key, name in trained)
    steps = [record for record in records(resumed.folder) if "loss" in record]
    for step in steps:
        assert step["loss"] == pytest.approx(step["colour"] + step["toy"] + step["mgd"])
        assert step["distillation"] == pytest.approx(step["toy"] + step["mgd"])
        assert 0 <= step["close"] <= 1 and "contrastive" not in step
    assert all(0.5 < steps[0][name] / 0.25 < 2 for name in ("toy", "mgd"))
    assert [record["distiller"] for record in of_kind(resumed.folder, "factor")] == ["mgd", "toy"]
    assert {record["distiller"] for record in of_kind(resumed.folder, "refresh")} == {"mgd", "toy"}
    assert re.search(r"colour \S+ \+ distillation \S+, ratio ", panel(resumed.folder))


def test_toy_framework_without_a_teacher(images, tmp_path):
    """One worker without a launcher."""
    options = [images, *SMALL, "--framework", "toy", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "toys", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert len(steps) == STEPS and all(record["loss"] == record["colour"] for record in steps)
    assert "100 %, epoch 1 step 6/6" in panel(tmp_path / "run")


def test_all_distillers_without_a_framework(start_job, images, narrow_teacher, tmp_path):
    """The run resumes within an epoch to the same bytes. One distiller has half the weight.

    Checkpoints have only the student. k-NN accuracy is measured, and the panel has no contrast.
    """
    options = [images, *SMALL, "--framework", "none", "--teacher", narrow_teacher, *DISTILLED]
    options += ["--distill", *WEIGHTS, "--distill-weights", *WEIGHTS.values(), *POOLED]
    options += ["--knn-every", 2]
    folder = check_resume(start_job, 2, tmp_path, options, (0, 4))
    first, last = (
        torch.load(folder / name, weights_only=True)
        for name in ("checkpoint_0000_000004.pth.tar", "last.pth.tar")
    )
    assert {key.split(".")[1] for key in last["state_dict"]} == {"encoder_q"}
    trained = [("simreg", "head.7.weight"), ("similarity", "head.2.weight")]
    trained += [("disco", "head.2.weight"), ("similarity", "queue")]
    assert not any(torch.equal(first[key][name], last[key][name]) for key, name in trained)
    assert last["similarity"]["queue_ptr"].item() == STEPS * 8 % 20
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in every if "loss" in record]
    assert len(steps) == STEPS
    assert all(record["loss"] == pytest.approx(record["distillation"]) for record in steps)
    assert all(0 < record[each] < 2 for record in steps for each in WEIGHTS)
    assert steps[0]["loss"] == pytest.approx(0.5 * math.log(65537), rel=0.5)
    for name in ("mgd", "projector", "gram"):
        expected = WEIGHTS[name] / sum(WEIGHTS.values()) * 0.5 * math.log(65537)
        assert steps[0][name] == pytest.approx(expected, rel=0.5)
    assert sum("knn" in record for record in every) == 1
    assert "contrast" not in panel(folder)


def test_moco_with_a_distilled_head(start_job, images, narrow_teacher, tmp_path):
    """The run resumes within an epoch to the same bytes.

    MoCo's own head follows the teacher's on both views.
    """
    options = [images, *SMALL, "--mlp", "--moco-k", 16, "--teacher", narrow_teacher]
    options += ["--config", "disco", "--distill", "disco", "simreg", "--head-width", 24]
    folder = check_resume(start_job, 2, tmp_path, options, (1, 4))
    saved = torch.load(folder / "last.pth.tar", weights_only=True)
    assert saved["state_dict"]["module.encoder_q.fc.0.weight"].shape == (24, 128)
    assert list(saved["disco"]) == ["factor"] and saved["disco"]["factor"] == 1 / 64
    steps = of_kind(folder, "step")
    for step in steps:
        assert 0 < step["disco"] < 64 * 4 / 128
        losses = step["contrastive"] + step["disco"] + step["simreg"]
        assert step["loss"] == pytest.approx(losses)


def test_correction_and_pooled_features(start_job, images, narrow_teacher, tmp_path):
    """A killed run resumes to the same bytes, and 1 and 4 workers solve the same matching.

    They repeat the refresh of epoch 1 from the same checkpoint. The exported student has no tensors
    of the distiller.
    """
    options = [images, *SMALL, "--teacher", narrow_teacher, *DISTILLED, "--moco-k", 16]
    options += ["--mgd-correction", "--mgd-pooled", 1]
    reference, output = check_kill(start_job, tmp_path, options)
    assert output.count("  pooled: matching 2x128 of 256, cost ") == 2

    end_of_epoch_0 = "checkpoint_0001_000000.pth.tar"
    first, half, last = (
        torch.load(reference / name, weights_only=True)
        for name in ("checkpoint_0000_000002.pth.tar", end_of_epoch_0, "last.pth.tar")
    )
    trained = ["correction1.weight", "correction4.weight", "pooled.bn.weight"]
    assert not any(torch.equal(first["mgd"][name], last["mgd"][name]) for name in trained)
    matchings = [name for name in last["mgd"] if "matching" in name]
    assert len(matchings) == 5
    assert not all(torch.equal(half["mgd"][name], last["mgd"][name]) for name in matchings)
    assert not any("correction" in name or "pooled" in name for name in last["state_dict"])
    exported = read_backbone(str(reference / "last.pth.tar"), "").state
    assert not any("correction" in name for name in exported)
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        os.link(reference / end_of_epoch_0, folder / end_of_epoch_0)
        finished(start_job(workers, folder, options))
        solved = torch.load(folder / "last.pth.tar", weights_only=True)["mgd"]
        assert all(torch.equal(solved[name], last["mgd"][name]) for name in matchings)


COMPRESS = "--config compress --similarity-k 20 --similarity-m 0.9".split()


@pytest.mark.parametrize(("framework", "workers"), [("none", 2), ("moco", 4)])
def test_momentum_encoder(start_job, images, narrow_teacher, tmp_path, framework, workers):
    """The run resumes within an epoch to the same bytes.

    Running statistics differ between workers. Readers of a checkpoint load the student.
    """
    options = [images, *SMALL, *COMPRESS, "--framework", framework, "--teacher", narrow_teacher]
    options += ["--mlp", "--moco-k", 16] if framework == "moco" else []
    folder = check_resume(start_job, workers, tmp_path, options, (0, 4))

    checkpoints = [folder / name for name in ("checkpoint_0000_000004.pth.tar", "last.pth.tar")]
    first, last = (torch.load(path, weights_only=True) for path in checkpoints)
    assert first["statistics"].unique(dim=0).shape[0] == workers
    of_student, prefix = last["state_dict"].items(), "module.encoder_q."
    student = {key[len(prefix) :]: value for key, value in of_student if key.startswith(prefix)}
    followed = last["momentum_encoder"]
    assert followed.keys() == {key for key in student if not key.startswith("fc.")}
    weight = "layer1.0.conv1.weight"
    assert not torch.equal(followed[weight], student[weight])
    assert not torch.equal(followed[weight], first["momentum_encoder"][weight])
    assert last["similarity"]["queue"].shape == (256 + 128, 20)
    assert last["similarity"]["queue_ptr"].item() == STEPS * 8 % 20
    loaded = read_backbone(str(folder / "last.pth.tar"))
    assert all(torch.equal(value, student[key]) for key, value in loaded.state.items())


SIMSIAM = "--framework simsiam --dim 32 --pred-dim 8 --fix-pred-lr --lr 0.05".split()


def test_simsiam_with_three_distillers(start_job, images, narrow_teacher, tmp_path):
    """A killed run resumes to the same bytes.

    The teacher is MoCo's. Watch, TensorBoard, report and readers of checkpoints accept the run.
    """
    options = [images, *SMALL, *SIMSIAM, "--teacher", narrow_teacher, *DISTILLED]
    options += ["--distill", "mgd", "similarity", "gram", "--similarity-k", 20]
    options += ["--knn-every", 2, "--tensorboard", "-p", 1]
    reference, _ = check_kill(start_job, tmp_path, options)

    saved = torch.load(reference / "last.pth.tar", weights_only=True)
    names = [name.split(".") for name in saved["state_dict"]]
    assert {name[1] for name in names} == {"encoder", "predictor"}
    assert {name[3] for name in names if name[1:3] == ["encoder", "fc"]} == set("013467")
    groups = saved["optimizer"]["param_groups"]
    # --cos in epoch 1 of 2. The predictor's rate is constant.
    assert [group["lr"] for group in groups] == pytest.approx([0.025, 0.05])
    steps = of_kind(reference, "step")
    for step in steps:
        assert step["loss"] == pytest.approx(step["cosine"] + step["distillation"])
    assert steps[0]["distillation"] == pytest.approx(0.5, rel=0.5)
    assert len(of_kind(reference, "knn")) == 1 and len(of_kind(reference, "refresh")) == 8
    text = panel(reference)
    assert re.search(r"cosine \S+ \+ distillation \S+, ratio ", text)
    assert "contrast" not in text
    check_steps(reference, STEPS)
    events = EventAccumulator(str(reference / "tensorboard"))
    assert "views/random" in events.Reload().Tags()["images"]
    report.main([str(reference), "--out", str(tmp_path / "report.html"), "--no-features"])
    page = (tmp_path / "report.html").read_text()
    assert "cosine loss" in page and "MoCo" not in page
    assert "mlp 128-128-128-32" in read_backbone(str(reference / "last.pth.tar")).report


def test_simsiam_on_four_workers(start_job, images, narrow_teacher, tmp_path):
    """The run resumes within an epoch to the same bytes.

    Only the heads' batch norms have statistics of all workers. The distillers see one view.
    """
    options = [images, *SMALL, *SIMSIAM, "--sync-bn", "heads", "--teacher", narrow_teacher]
    options += "--distill gram projector --mgd-views 1".split()
    folder = check_resume(start_job, 4, tmp_path, options, (0, 4))
    state = torch.load(folder / "checkpoint_0000_000004.pth.tar", weights_only=True)
    assert state["statistics"].shape[0] == 4
    assert state["statistics"].unique(dim=0).shape[0] == 4
