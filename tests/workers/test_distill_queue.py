"""A distiller's queue is the same for any number of workers and micro-batches."""

import pytest
import torch
from distillers import S, T, build

from job.cluster.objects import allgather
from job.distill.base import Networks
from job.distill import distillation
from job.distill.distillation import Distillation
from job.distill.momentum import MOMENTUM
from job.frameworks.base import MicroBatch
from job.position import START

TOTAL, K, STEPS = 8, 20, 4


class Teacher:
    """Maps that depend only on the image."""

    def features(self, images, indices):
        return {
            "layer4": images.mean((1, 2, 3))[:, None, None, None]
            * torch.arange(1.0, T + 1).view(1, T, 1, 1)
            + 0.1
        }


class Follower:
    """A momentum encoder whose features depend only on the image."""

    def __init__(self, framework, m):
        self.module = torch.nn.Identity()

    def pooled(self, images):
        return images.amax((1, 2, 3))[:, None] * torch.arange(1.0, S + 1) + 0.1

    def update(self):
        pass


def batch(run, step, accumulate):
    """Yield the micro-batches of this worker's images of a step."""
    images = torch.rand(TOTAL, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    B = TOTAL // run.size
    first, size = run.rank * B, B // accumulate
    for index in range(accumulate):
        start = first + index * size
        yield MicroBatch(images[start:][:size], START, index, start)


def queue_after(run, accumulate, setting):
    distiller = build("similarity", similarity=setting, similarity_k=K)
    framework = type("Framework", (), {"distilled_views": 1})
    distillation = Distillation(
        distiller.config, Networks(run, None, framework, Teacher()), [distiller]
    )
    for step in range(STEPS):
        for micro in batch(run, step, accumulate):
            distillation.targets(micro)
        distillation.after_update()
    return distiller.module.queue


@pytest.mark.parametrize("setting", ["headless", "compress"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_queue_equals_one_worker_s(run, monkeypatch, accumulate, setting):
    """compress has two queues in one tensor."""
    monkeypatch.setattr(distillation, "MomentumEncoder", Follower)
    queue = queue_after(run, accumulate, setting)
    distiller = build("similarity", similarity=setting, similarity_k=K)
    for step in range(STEPS):
        images = torch.rand(TOTAL, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        features = Teacher().features(images, None) | {
            MOMENTUM: Follower(None, None).pooled(images)
        }
        distiller.after_update(distiller.targets(features, None))
    same = torch.equal(queue, distiller.module.queue)
    assert all(allgather(same, "queue")) and distiller.module.queue_ptr.item() == STEPS * TOTAL % K
