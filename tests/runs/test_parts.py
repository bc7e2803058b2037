"""A framework and a distiller that the program has never seen, and none of the frameworks, train through the same loop."""

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

SMALL = "-a resnet18 --stem small --width 16 --image-size 16 --batch-size 8 --epochs 2 --cos --warmup-epochs 0 -j 0".split()
SMALL += "--lr 0.003 --save-every 2steps --keep 99 --resume auto --check-every 4".split()
WEIGHTS = {"mgd": 1, "projector": 1, "gram": 0.5, "simreg": 1, "similarity": 1, "disco": 1}
POOLED = "--similarity seed --similarity-k 20 --head-width 32".split()
DISTILLED = ["--refresh-epochs", "0,1", "--loss-share", 0.5]
EPOCH = 50 // 8  # steps
STEPS = 2 * EPOCH
# Worker 1 opens 18 training images for a pass over all, none for a loss factor, and 4 a step.
BEFORE_EPOCH_1 = 2 * 18 + 4 * EPOCH
IN_THE_SECOND_DISTILLER = f"1 open /train/ {BEFORE_EPOCH_1 + 18 + 5} 1 -{signal.SIGTERM:d}"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The program `toys` is found."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), prepend=os.pathsep)


def finished(job):
    output = job.finish()
    assert job.process.returncode == 0, output
    return output


def resumed_within_an_epoch(start_job, workers, folder, options, place):
    """Run, resume a copy from its checkpoint of (epoch, step) `place`, and compare both.

    Return the folder of the whole run.
    """
    whole = start_job(workers, folder / "whole", options)
    finished(whole)
    (folder / "run").mkdir()
    name = "checkpoint_{:04d}_{:06d}.pth.tar".format(*place)
    os.link(whole.folder / name, folder / "run" / name)
    again = start_job(workers, folder / "run", options)
    finished(again)
    [resumed] = of_kind(again.folder, "resumed")
    assert (resumed["epoch"], resumed["step"]) == place
    assert differences(whole.folder, again.folder) == []
    return whole.folder


def watched(folder):
    """The panel of `mgd-watch --once`."""
    command = [sys.executable, "-m", "job.show.watch", "--once", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_toy_framework_and_two_distillers_resume_to_the_same_bytes(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
    monkeypatch,
):
    """After a signal in the second distiller's preparation, and after a kill within an epoch.

    Each distiller has half of --loss-share. Nothing of the toys is named in the program.
    """
    options = [images, *SMALL, "--framework", "toy", "--teacher", narrow_teacher, *DISTILLED]
    options += ["--distill", "mgd", "toy"]
    whole = start_job(2, tmp_path / "whole", options, "toys")
    finished(whole)
    with monkeypatch.context() as patch:
        for name, value in injected(IN_THE_SECOND_DISTILLER).items():
            patch.setenv(name, value)
        stopped = start_job(2, tmp_path / "run", options, "toys")
    output = finished(stopped)
    assert re.search(
        r"epoch 0 mean.*measuring: (\d+) of \1 batches", output, re.DOTALL
    )  # mgd has measured
    assert stopped.steps() == list(range(1, EPOCH + 1))
    expected = [record for record in records(whole.folder) if record["epoch"] == 0]
    assert records(stopped.folder) == expected
    killed = start_job(2, tmp_path / "run", options, "toys")
    killed.wait_for_step(EPOCH + 3)
    killed.kill()
    assert len(killed.steps()) < STEPS
    again = start_job(2, tmp_path / "run", options, "toys")
    finished(again)
    places = [(record["epoch"], record["step"]) for record in of_kind(again.folder, "resumed")]
    assert places[0] == (1, 0) and len(places) == 2
    assert again.steps() == list(range(1, STEPS + 1))
    assert differences(whole.folder, again.folder) == []
    assert records(whole.folder) == records(again.folder)

    first, last = (
        torch.load(whole.folder / name, weights_only=True)
        for name in ("checkpoint_0000_000002.pth.tar", "last.pth.tar")
    )
    trained = [
        ("state_dict", "module.guess.weight"),
        ("toy", "projector.weight"),
        ("mgd", "bn4.weight"),
    ]
    assert not any(torch.equal(first[part][name], last[part][name]) for part, name in trained)
    steps = [record for record in records(again.folder) if "loss" in record]
    assert all(
        record["loss"] == pytest.approx(record["colour"] + record["toy"] + record["mgd"])
        for record in steps
    )
    assert all(
        record["distillation"] == pytest.approx(record["toy"] + record["mgd"]) for record in steps
    )
    assert all(0 <= record["close"] <= 1 and "contrastive" not in record for record in steps)
    assert all(0.5 < record / 0.25 < 2 for record in (steps[0]["toy"], steps[0]["mgd"]))
    assert [record["distiller"] for record in of_kind(again.folder, "factor")] == ["mgd", "toy"]
    assert {record["distiller"] for record in of_kind(again.folder, "refresh")} == {"mgd", "toy"}
    assert re.search(r"colour \S+ \+ distillation \S+, ratio ", watched(again.folder))


def test_a_toy_framework_trains_without_a_teacher(images, tmp_path):
    """By one worker without a launcher."""
    command = [
        sys.executable,
        "-m",
        "toys",
        *map(str, [images, *SMALL, "--framework", "toy", "--out", tmp_path / "run"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert len(steps) == STEPS and all(record["loss"] == record["colour"] for record in steps)
    assert "100 %, epoch 1 step 6/6" in watched(tmp_path / "run")


def test_distillation_without_a_framework_resumes_within_an_epoch_to_the_same_bytes(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
):
    """From all distillers, of which one weighs half as much.

    Checkpoints have the student only. Its accuracy is measured; the panel has no contrast accuracy.
    """
    options = [images, *SMALL, "--framework", "none", "--teacher", narrow_teacher, *DISTILLED]
    options += [
        "--distill",
        *WEIGHTS,
        "--distill-weights",
        *WEIGHTS.values(),
        *POOLED,
        "--knn-every",
        2,
    ]
    folder = resumed_within_an_epoch(start_job, 2, tmp_path, options, (0, 4))
    first, last = (
        torch.load(folder / name, weights_only=True)
        for name in ("checkpoint_0000_000004.pth.tar", "last.pth.tar")
    )
    assert {key.split(".")[1] for key in last["state_dict"]} == {"encoder_q"}
    trained = [
        ("simreg", "head.7.weight"),
        ("similarity", "head.2.weight"),
        ("disco", "head.2.weight"),
    ]
    trained += [("similarity", "queue")]
    assert not any(torch.equal(first[part][key], last[part][key]) for part, key in trained)
    assert last["similarity"]["queue_ptr"].item() == STEPS * 8 % 20
    records_of = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records_of if "loss" in record]
    assert len(steps) == STEPS
    assert all(record["loss"] == pytest.approx(record["distillation"]) for record in steps)
    assert all(0 < record[each] < 2 for record in steps for each in WEIGHTS)
    assert steps[0]["loss"] == pytest.approx(0.5 * math.log(65537), rel=0.5)
    for name in ("mgd", "projector", "gram"):
        expected = WEIGHTS[name] / sum(WEIGHTS.values()) * 0.5 * math.log(65537)
        assert steps[0][name] == pytest.approx(expected, rel=0.5)
    assert sum("knn" in record for record in records_of) == 1
    assert "contrast" not in watched(folder)


def test_moco_with_a_distilled_head_resumes_within_an_epoch_to_the_same_bytes(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
):
    """Its own head follows the teacher's, on both views."""
    options = [images, *SMALL, "--mlp", "--moco-k", 16, "--teacher", narrow_teacher]
    options += ["--config", "disco", "--distill", "disco", "simreg", "--head-width", 24]
    folder = resumed_within_an_epoch(start_job, 2, tmp_path, options, (1, 4))
    saved = torch.load(folder / "last.pth.tar", weights_only=True)
    assert saved["state_dict"]["module.encoder_q.fc.0.weight"].shape == (24, 128)
    assert list(saved["disco"]) == ["factor"] and saved["disco"]["factor"] == 1 / 64
    steps = of_kind(folder, "step")
    assert all(0 < record["disco"] < 64 * 4 / 128 for record in steps)
    assert all(
        record["loss"] == pytest.approx(record["contrastive"] + record["disco"] + record["simreg"])
        for record in steps
    )


def test_a_correction_and_pooled_features_give_the_same_bytes_after_a_kill_and_matching_on_any_workers(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
):
    """The refresh of epoch 1 is solved again by 1 and by 4 workers, from the same checkpoint.

    The exported student has none of the distiller's tensors.
    """
    options = [images, *SMALL, "--teacher", narrow_teacher, *DISTILLED, "--moco-k", 16]
    options += ["--mgd-correction", "--mgd-pooled", 1]
    whole = start_job(2, tmp_path / "whole", options)
    output = finished(whole)
    assert output.count("  pooled: matching 2x128 of 256, cost ") == 2
    killed = start_job(2, tmp_path / "run", options)
    killed.wait_for_step(3)
    killed.kill()
    assert len(killed.steps()) < STEPS
    again = start_job(2, tmp_path / "run", options)
    finished(again)
    assert differences(whole.folder, again.folder) == []
    assert records(whole.folder) == records(again.folder)

    first, half, last = (
        torch.load(whole.folder / name, weights_only=True)
        for name in (
            "checkpoint_0000_000002.pth.tar",
            "checkpoint_0001_000000.pth.tar",
            "last.pth.tar",
        )
    )
    trained = ["correction1.weight", "correction4.weight", "pooled.bn.weight"]
    assert not any(torch.equal(first["mgd"][name], last["mgd"][name]) for name in trained)
    matchings = [name for name in last["mgd"] if "matching" in name]
    assert len(matchings) == 5
    assert not all(torch.equal(half["mgd"][name], last["mgd"][name]) for name in matchings)
    assert not any("correction" in name or "pooled" in name for name in last["state_dict"])
    assert not any(
        "correction" in name for name in read_backbone(str(whole.folder / "last.pth.tar"), "").state
    )
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        os.link(
            whole.folder / "checkpoint_0001_000000.pth.tar",
            folder / "checkpoint_0001_000000.pth.tar",
        )
        job = start_job(workers, folder, options)
        finished(job)
        found = torch.load(folder / "last.pth.tar", weights_only=True)["mgd"]
        assert all(torch.equal(found[name], last["mgd"][name]) for name in matchings)


COMPRESS = "--config compress --similarity-k 20 --similarity-m 0.9".split()


@pytest.mark.parametrize(("framework", "workers"), [("none", 2), ("moco", 4)])
def test_a_run_with_a_momentum_encoder_resumes_within_an_epoch_to_the_same_bytes(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
    framework,
    workers,
):
    """Each worker has running statistics of its own. Readers of a checkpoint take the student."""
    options = [images, *SMALL, *COMPRESS, "--framework", framework, "--teacher", narrow_teacher]
    options += ["--mlp", "--moco-k", 16] if framework == "moco" else []
    whole = start_job(workers, tmp_path / "whole", options)
    finished(whole)
    (tmp_path / "run").mkdir()
    name = "checkpoint_0000_000004.pth.tar"
    os.link(whole.folder / name, tmp_path / "run" / name)
    again = start_job(workers, tmp_path / "run", options)
    finished(again)
    [resumed] = of_kind(again.folder, "resumed")
    assert (resumed["epoch"], resumed["step"]) == (0, 4)
    assert differences(whole.folder, again.folder) == []

    checkpoints = [whole.folder / each for each in (name, "last.pth.tar")]
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
    found = read_backbone(str(whole.folder / "last.pth.tar"))
    assert all(torch.equal(value, student[key]) for key, value in found.state.items())


SIMSIAM = "--framework simsiam --dim 32 --pred-dim 8 --fix-pred-lr --lr 0.05".split()


def test_a_killed_simsiam_run_resumes_to_the_same_bytes(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
):
    """From a teacher of MoCo's. What looks at runs and what reads checkpoints takes them."""
    options = [images, *SMALL, *SIMSIAM, "--teacher", narrow_teacher, *DISTILLED]
    options += ["--distill", "mgd", "similarity", "gram", "--similarity-k", 20]
    options += ["--knn-every", 2, "--tensorboard", "-p", 1]
    whole = start_job(2, tmp_path / "whole", options)
    finished(whole)
    killed = start_job(2, tmp_path / "run", options)
    killed.wait_for_step(3)
    killed.kill()
    assert len(killed.steps()) < STEPS
    again = start_job(2, tmp_path / "run", options)
    finished(again)
    [resumed] = of_kind(again.folder, "resumed")
    assert resumed["step"] > 0 and again.steps() == list(range(1, STEPS + 1))
    assert differences(whole.folder, again.folder) == []
    assert records(again.folder) == records(whole.folder)

    saved = torch.load(whole.folder / "last.pth.tar", weights_only=True)
    names = [name.split(".") for name in saved["state_dict"]]
    assert {name[1] for name in names} == {"encoder", "predictor"}
    assert {name[3] for name in names if name[1:3] == ["encoder", "fc"]} == set("013467")
    groups = saved["optimizer"]["param_groups"]
    # --cos, in epoch 1 of 2; the predictor's stays.
    assert [group["lr"] for group in groups] == pytest.approx([0.025, 0.05])
    steps = of_kind(whole.folder, "step")
    for step in steps:
        assert step["loss"] == pytest.approx(step["cosine"] + step["distillation"])
    assert steps[0]["distillation"] == pytest.approx(0.5, rel=0.5)
    assert len(of_kind(whole.folder, "knn")) == 1 and len(of_kind(whole.folder, "refresh")) == 8
    panel = watched(whole.folder)
    assert re.search(r"cosine \S+ \+ distillation \S+, ratio ", panel)
    assert "contrast" not in panel
    check_steps(whole.folder, STEPS)
    events = EventAccumulator(str(whole.folder / "tensorboard"))
    assert "views/random" in events.Reload().Tags()["images"]
    report.main([str(whole.folder), "--out", str(tmp_path / "report.html"), "--no-features"])
    assert "cosine loss" in (tmp_path / "report.html").read_text()
    assert "MoCo" not in (tmp_path / "report.html").read_text()
    assert "mlp 128-128-128-32" in read_backbone(str(whole.folder / "last.pth.tar")).report


def test_a_simsiam_run_of_four_workers_resumes_within_an_epoch_to_the_same_bytes(
    start_job,
    images,
    narrow_teacher,
    tmp_path,
):
    """Some batch norms have statistics of all workers, and some each worker's own.

    The distillers' are each worker's own too, of one view.
    """
    options = [images, *SMALL, *SIMSIAM, "--sync-bn", "heads", "--teacher", narrow_teacher]
    options += "--distill gram projector --mgd-views 1".split()
    folder = resumed_within_an_epoch(start_job, 4, tmp_path, options, (0, 4))
    state = torch.load(folder / "checkpoint_0000_000004.pth.tar", weights_only=True)
    assert state["statistics"].shape[0] == 4
    assert state["statistics"].unique(dim=0).shape[0] == 4
