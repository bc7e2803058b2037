"""Passes over images: split over the workers, and stopped by a signal to one worker."""

import copy
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from job.evaluate import knn
from job.distill import mgd, loss_factor
from job.distill.base import Networks
from job.distill.mgd import MGD
from job.distill.teacher import Teacher
from job.cluster import comm
from job.config import Config
from job.data.folders import scan
from job.engine.passes import centre_crops
from job.cluster.objects import allgather
from job.cluster.stop import Stopped
from mgd.distiller import MGDistiller
from job.networks import build_resnet, stage_norms, with_features
from runs import Kept

# 11 batches: the last of two or four workers has one fewer.
IMAGES, BATCH, STAGES = 21, 2, [2, 4]


@pytest.fixture
def run(run, monkeypatch):
    """The session's run, with a log that keeps lines and records, and without bad images."""
    monkeypatch.setattr(run, "log", Kept())
    monkeypatch.setattr(run, "bad_images", set())
    return run


@pytest.fixture(scope="module")
def networks():
    """A small student and a teacher."""
    torch.manual_seed(0)
    return tuple(build_resnet("resnet18", stem="small", width=8) for _ in range(2))


@pytest.fixture
def training(run, networks, tmp_path, monkeypatch):
    """Copies of student and teacher, and images of noise. The first is undecodable."""
    for module in (mgd, loss_factor, knn):
        monkeypatch.setattr(module, "BATCH", BATCH)
    monkeypatch.setattr(loss_factor, "BATCHES", 11)
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / "train" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    (tmp_path / "train" / "class0" / "00.png").write_bytes(b"no image")
    student, teacher = copy.deepcopy(networks)
    widths = {stage: norm.num_features for stage, norm in stage_norms(student).items()}
    channels = {stage: (widths[stage], widths[stage]) for stage in STAGES}
    config = Config(image_size=16, workers=0, max_bad_images=5)
    images = scan(str(tmp_path), "train", max_bad=5)
    distiller = object.__new__(MGD)
    distiller.config, distiller.module = config, MGDistiller(channels, factor=123.0)
    framework = SimpleNamespace(
        encoder=with_features(student, STAGES).train(), reference=4.6, reference_text="ln(100)"
    )
    teacher = Teacher(with_features(teacher, STAGES).eval(), norms={}, digest="", shown="")
    networks = Networks(run, images, framework, teacher)
    return SimpleNamespace(
        config=config,
        run=run,
        images=images,
        student=student,
        distiller=distiller,
        networks=networks,
    )


def signal_last_worker(run, patch):
    """Simulate a signal to the last worker: the session's run has no handlers."""
    if run.rank == run.size - 1:
        patch.setattr(run.stop, "signal", signal.SIGTERM)


def every(value):
    return allgather(value, "every")


def crops(training, chosen):
    return centre_crops(
        training.images, list(range(chosen)), BATCH, training.config, training.run, "a pass"
    )


@pytest.mark.parametrize("chosen", [IMAGES, 5, 1, 0])
def test_workers_split_all_chosen_images(training, chosen):
    """Some workers may have one batch fewer, or none."""
    mine = [(len(inputs), labels.tolist()) for inputs, labels in crops(training, chosen)]
    batches = [batch for worker in every(mine) for batch in worker]
    assert sum(length for length, _ in batches) == chosen
    expected = [-1, *training.images.labels[1:chosen].tolist()][:chosen]
    assert sorted(label for _, labels in batches for label in labels) == sorted(expected)
    assert every(len(training.run.bad_images)) == [int(chosen > 0)] * comm.size()


@pytest.mark.parametrize("last", [False, True], ids=["the first batch", "the last batch"])
def test_signal_to_one_worker_stops_all(training, monkeypatch, last):
    """All stop after the same batch: the next, or the last. The next pass is complete."""
    own = len(list(crops(training, IMAGES)))
    at = own if last else 1
    done, stopped = 0, False
    with monkeypatch.context() as signalled:
        try:
            for _ in crops(training, IMAGES):
                done += 1
                if done == at:
                    signal_last_worker(training.run, signalled)
        except Stopped:
            stopped = True
    assert every((stopped, done)) == [
        (True, count if last else min(2, count)) for count in every(own)
    ]
    assert every(len(list(crops(training, IMAGES)))) == every(own)


WORK = {
    "refresh": lambda of: mgd.prepare_refresh(of.distiller, 1, of.networks),
    "factor": lambda of: loss_factor.measure_factor(of.distiller, of.networks, 0.3),
    "k-NN": lambda training: knn.knn_accuracy(
        training.student, training.images, training.images, training.config, training.run
    ),
}


@pytest.mark.parametrize("work", WORK)
def test_stopped_work_leaves_no_change_or_record(training, monkeypatch, work):
    """The student is in train mode again, and its running statistics are unchanged."""
    student = training.networks.framework.encoder
    modules = {
        "student": student,
        "teacher": training.networks.teacher.net,
        "distiller": training.distiller.module,
    }
    before = {
        name: {key: value.clone() for key, value in net.state_dict().items()}
        for name, net in modules.items()
    }

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: signal_last_worker(training.run, monkeypatch)
    )
    try:
        WORK[work](training)
        stopped = False
    except Stopped:
        stopped = True
    hook.remove()
    monkeypatch.setattr(training.run.stop, "signal", None)
    after = {name: net.state_dict() for name, net in modules.items()}
    same = all(
        torch.equal(value, after[name][key])
        for name, old in before.items()
        for key, value in old.items()
    )
    log = training.run.log
    assert every((stopped, same, log.lines, log.records)) == [(True, True, [], [])] * comm.size()
    assert every(student.training or work == "k-NN") == [True] * comm.size()
