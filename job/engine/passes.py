"""Passes over images without training, divided over the workers.

A signal to any worker stops all of them after the same batch.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from job.data.augment import normalize
from job.data.folders import every_nth_batch
from job.data.images import Images
from job.data.views import CentreViews
from job.engine.run import Run
from job.options import Common

BATCH = 32  # images that a distiller measures at a time, for any number of workers


def centre_crops(
    images: Images,
    chosen: Sequence[int],
    batch: int,
    config: Common,
    run: Run,
    what: str,
    kind: type[CentreViews] = CentreViews,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this worker's batches: normalised centre crops (b, 3, H, W) and labels (b,).

    A collective. A label is -1 if the image is undecodable or has none. With the `kind`
    NumberedCrops, the indices of the images in the crops are in place of the labels.
    chosen: indices of `images`. batch: images at a time, for any number of workers. what: the name
    of the pass in the log.
    RunError, on all workers: too many undecodable files.
    Stopped, on all workers: a signal came.
    """
    batches = every_nth_batch(chosen, batch, run.rank, run.size)
    views = run.batches(kind(images, config.image_size), batches, config.workers)
    bad: list[str] = []
    for done in run.rounds(len(every_nth_batch(chosen, batch, 0, run.size))):
        if done <= len(batches):  # rank 0 can have one batch more
            pixels, labels, undecodable = next(views)  # (b, 3, H, W) uint8, (b,)
            pixels, labels = (each.to(run.device, non_blocking=True) for each in (pixels, labels))
            yield normalize(pixels), labels
            bad += undecodable
            run.log.progress(
                f"{what}: {done} of {len(batches)} batches",
                done,
                len(batches),
                10 * config.print_freq,
            )
    run.note_bad_images(bad, config.max_bad_images, images)


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Set a network to eval mode, and back to train mode afterwards."""
    net.eval()
    try:
        yield
    finally:
        net.train()
