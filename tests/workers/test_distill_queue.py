"""A distiller's queue: the same on every worker, and for any number of workers and micro-batches."""

import pytest
import torch
from distillers import T, build

from job.cluster.objects import allgather
from job.distill.base import Networks
from job.distill.distillation import Distillation
from job.frameworks.base import MicroBatch
from job.position import START

TOTAL, K, STEPS = 8, 20, 4


class Teacher:
    """Gives maps that follow from the image alone."""

    def net(self, images):
        return {"layer4": images.mean((1, 2, 3))[:, None, None, None] * torch.arange(1.0, T + 1).view(1, T, 1, 1) + 0.1}


def batch(run, step, accumulate):
    """The micro-batches of this worker's part of a step's images."""
    images = torch.rand(TOTAL, 3, 2, 2, generator=torch.Generator().manual_seed(step))
    share = TOTAL // run.size
    first, size = run.rank * share, share // accumulate
    for part in range(accumulate):
        own = images[first + part * size :][:size]
        yield MicroBatch(own, START, part, first + part * size)


def queue_after(run, accumulate):
    distiller = build("similarity", similarity_k=K)
    framework = type("Framework", (), {"distilled_views": 1})
    distillation = Distillation(distiller.config, Networks(run, None, framework, Teacher()), [distiller])
    for step in range(STEPS):
        for micro in batch(run, step, accumulate):
            distillation.targets(micro)
        distillation.after_update()
    return distiller.module.queue


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_queue_is_that_of_one_worker(run, accumulate):
    found = queue_after(run, accumulate)
    distiller = build("similarity", similarity_k=K)
    for step in range(STEPS):
        images = torch.rand(TOTAL, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        distiller.after_update(distiller.targets(Teacher().net(images), None))
    same = torch.equal(found, distiller.module.queue)
    assert all(allgather(same, "queue")) and distiller.module.queue_ptr.item() == STEPS * TOTAL % K
