"""The loss factor of --loss-share has the same bits for any number of workers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from job.distill import loss_factor
from job.distill.base import Networks
from job.distill.mgd import MGD
from job.distill.teacher import Teacher
from job.config import Config
from job.data.folders import scan
from job.cluster.objects import allgather
from mgd.distiller import MGDistiller
from job.networks import build_resnet, stage_norms, with_features

STAGES = [2, 4]


@pytest.fixture
def training(run, tmp_path, monkeypatch):
    """A student and a teacher, both ResNet-18, and a copy of noise images on each worker."""
    monkeypatch.setattr(loss_factor, "BATCH", 4)
    monkeypatch.setattr(loss_factor, "BATCHES", 5)
    monkeypatch.setattr(run, "bad_images", set())
    generator = np.random.default_rng(0)
    for number in range(23):
        path = tmp_path / "train" / "a" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    student, teacher = (build_resnet("resnet18", stem="small") for _ in range(2))
    widths = {stage: norm.num_features for stage, norm in stage_norms(student).items()}
    channels = {stage: (widths[stage], widths[stage]) for stage in STAGES}
    distiller = object.__new__(MGD)
    distiller.config = Config(image_size=16, workers=0)
    distiller.module = MGDistiller(channels, "rd")
    framework = SimpleNamespace(
        encoder=with_features(student, STAGES), reference=math.log(100), reference_text="ln(100)"
    )
    teacher = Teacher(with_features(teacher, STAGES).eval(), norms={}, digest="", shown="")
    return distiller, Networks(run, scan(str(tmp_path), "train", max_bad=5), framework, teacher)


def test_factor_equals_one_worker_s(training, monkeypatch):
    """Each worker also computes it for itself, without collectives."""
    distiller, networks = training
    together = loss_factor.measure_factor(distiller, networks, 0.3).state["factor"].item()
    with monkeypatch.context() as patch:
        patch.setattr(networks.run, "rank", 0)
        patch.setattr(networks.run, "size", 1)
        patch.setattr(networks.run, "note_bad_images", lambda *_: None)
        patch.setattr(loss_factor.comm, "total", lambda values, name: values)
        single = loss_factor.measure_factor(distiller, networks, 0.3).state["factor"].item()
    factors = allgather((together, single), "factors")
    assert len({factor for pair in factors for factor in pair}) == 1
    assert 0 < together < 1e9
