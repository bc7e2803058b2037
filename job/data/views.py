"""From images to batches: two random views for training, one centre crop for measuring."""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from job.data.images import Images
from job.data.seeds import counter
from job.run.memory import keep_freed_memory
from job.run.stop import SIGNALS
from moco.augment import CentreView, RandomView, View

KEPT = 2**24  # bytes; what larger images take is given back


class TwoViews(Dataset):
    """(epoch, index) -> query view, key view, undecodable files; the views are functions of seed, epoch and index.

    With `rendered` false a view is a pair, a crop and its appearance, to be rendered on the device.
    """

    def __init__(self, images: Images, view: RandomView, seed: int, rendered: bool = True):
        self.images, self.view, self.seed, self.rendered = images, view, seed, rendered

    def __getitem__(self, draw: tuple[int, int]) -> tuple:
        epoch, index = draw
        image, _, bad = self.images.read(index)
        random = np.random.Generator(counter(self.seed, "view", epoch=epoch, sample=index))
        if self.rendered:
            return self.view(image, random), self.view(image, random), bad  # (3, H, W) uint8 each
        query, key = ((self.view.crop(image, random), torch.from_numpy(self.view.appearance(random))) for _ in range(2))
        return query, key, bad  # (3, H, W) uint8 and (12,) float32 each


class OneView(Dataset):
    """(epoch, index) -> view (3, H, W) uint8, label, undecodable files; the view is a function of seed, epoch and index."""

    def __init__(self, images: Images, view: View, seed: int):
        self.images, self.view, self.seed = images, view, seed

    def __getitem__(self, draw: tuple[int, int]) -> tuple[torch.Tensor, int, list[str]]:
        epoch, index = draw
        image, label, bad = self.images.read(index)
        return self.view(image, np.random.Generator(counter(self.seed, "view", epoch=epoch, sample=index))), label, bad


class CentreViews(Dataset):
    """index -> centre crop (3, H, W) uint8, label, undecodable files; the label is -1 where another image stands in."""

    def __init__(self, images: Images, size: int):
        self.images = images
        self.view = CentreView(size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[str]]:
        image, label, bad = self.images.read(index)
        return self.view(image), -1 if bad else label, bad


def collate(items: list[tuple]) -> tuple:
    """Stack what the items begin with; join the lists of undecodable files that they end with."""
    first, second, bad = zip(*items, strict=True)
    return stack(first), stack(second), [file for files in bad for file in files]


def stack(parts: tuple) -> Any:
    """Return pairs as a pair of stacks, numbers as a tensor (B,), vectors as (B, D), views as (B, 3, H, W) channels last."""
    if isinstance(parts[0], tuple):
        return tuple(stack(part) for part in zip(*parts, strict=True))
    if not torch.is_tensor(parts[0]):
        return torch.tensor(parts)
    if parts[0].dim() == 3:
        return torch.stack([view.permute(1, 2, 0) for view in parts]).permute(0, 3, 1, 2)
    return torch.stack(parts)


def start_fork_server(context: Any) -> None:
    """Start the process that loader processes are forked from, with the signals to stop blocked, as they stay in them.

    A signal to a whole process group is for the worker alone, which still needs the images of the step in
    progress. As SIGTERM does not end the loader processes either, they are killed at the worker's exit.
    """
    context.set_forkserver_preload(["job.data.views"])
    resource_tracker.ensure_running()  # before, as it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def kill_loader_processes() -> None:
    """Kill this process's loader processes that still run."""
    for process in multiprocessing.active_children():
        process.kill()


def begin(process: int) -> None:
    """Prepare a loader process: quick with memory, and to end when the worker that it loads for is killed.

    Its parent is the fork server, which lives as long as it does: each would wait for the other for ever.
    """
    keep_freed_memory(KEPT)
    worker = multiprocessing.parent_process()
    assert worker

    def follow() -> None:
        worker.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def loader(dataset: Dataset, batches: Iterable[list], processes: int, pin: bool) -> DataLoader:
    """Return a loader of `batches` (lists of the dataset's indices) with `processes` processes.

    The processes come from a fork server: Horovod's threads would not survive a plain fork.
    """
    context = None
    if processes:
        context = multiprocessing.get_context("forkserver")
        start_fork_server(context)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=processes,
        multiprocessing_context=context,
        worker_init_fn=begin,
        collate_fn=collate,
        pin_memory=pin,
    )
