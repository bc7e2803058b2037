"""From images to batches: two random views for training, one centre crop for measuring."""

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset

from job.data.folders import ImageFolder
from job.data.seeds import torch_seed
from job.run.stop import SIGNALS
from moco.augment import centre_view


class TwoViews(Dataset):
    """(epoch, index) -> query view, key view, undecodable files; the views are functions of seed, epoch and index."""

    def __init__(self, images: ImageFolder, transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, draw: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        epoch, index = draw
        image, _, bad = self.images.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.seed, "view", epoch=epoch, sample=index))
            return self.transform(image), self.transform(image), bad  # (3, H, W) uint8 each


class OneView(Dataset):
    """(epoch, index) -> view (3, H, W) uint8, label, undecodable files; the view is a function of seed, epoch and index."""

    def __init__(self, images: ImageFolder, transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, draw: tuple[int, int]) -> tuple[torch.Tensor, int, list[str]]:
        epoch, index = draw
        image, label, bad = self.images.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.seed, "view", epoch=epoch, sample=index))
            return self.transform(image), label, bad


class CentreViews(Dataset):
    """index -> centre crop (3, H, W) uint8, label, undecodable files; the label is -1 where another image stands in."""

    def __init__(self, images: ImageFolder, size: int):
        self.images = images
        self.transform = centre_view(size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[str]]:
        image, label, bad = self.images.read(index)
        return self.transform(image), -1 if bad else label, bad


def collate(items: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Stack what the items begin with; join the lists of undecodable files that they end with."""
    first, second, bad = zip(*items, strict=True)
    second = torch.stack(second) if torch.is_tensor(second[0]) else torch.tensor(second)
    return torch.stack(first), second, [file for files in bad for file in files]


def start_fork_server(context) -> None:
    """Start the process that loader processes are forked from, with the signals to stop blocked, as they stay in them.

    A signal to a whole process group is for the worker alone, which still needs the images of the step in
    progress. As SIGTERM does not end the loader processes either, they are killed at the worker's exit.
    """
    context.set_forkserver_preload(["job.data.views"])
    resource_tracker.ensure_running()  # before, as it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(kill_loader_processes)


def kill_loader_processes() -> None:
    """Kill this process's loader processes that still run."""
    for process in multiprocessing.active_children():
        process.kill()


def end_with_worker(process: int) -> None:
    """Let a loader process end when the worker that it loads for is killed.

    Its parent is the fork server, which lives as long as it does: each would wait for the other for ever.
    """
    worker = multiprocessing.parent_process()
    threading.Thread(target=lambda: (worker.join(), os._exit(1)), daemon=True).start()


def loader(dataset: Dataset, batches, processes: int, pin: bool) -> DataLoader:
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
        worker_init_fn=end_with_worker,
        collate_fn=collate,
        pin_memory=pin,
    )
