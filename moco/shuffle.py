"""Shuffled batch norm (arXiv 1911.05722, section 3.3): keys are encoded beside other images than their queries.

The total batch of N workers has positions 0..NB-1; worker r holds [rB, (r+1)B). A permutation of them that
all workers know gives worker w the positions permutation[wB:(w+1)B], which it encodes in ascending order:
that is the order in which an alltoall brings them. So an image travels once, and its key comes back once.
"""

from typing import Any, Protocol

import torch

from moco.copies import to_device


class Workers(Protocol):
    """What the workers send each other, by name; job/cluster/comm.py is one."""

    def rank(self) -> int:
        """Return this worker's number, from 0."""

    def size(self) -> int:
        """Return the number of workers."""

    def begin_exchange(self, tensor: torch.Tensor, counts: list[int], name: str) -> Any:
        """Begin to send counts[w] rows of a tensor to each worker w, in their order."""

    def begin_gather(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to gather all workers' rows, by rank."""

    def wait(self, pending: Any) -> torch.Tensor:
        """Return the result of what was begun."""


def order(permutation: torch.Tensor, size: int) -> torch.Tensor:
    """Return (N, B): row w has the positions that worker w encodes, ascending."""
    return permutation.view(size, -1).sort(dim=1).values


class Shuffle:
    """The shuffle of one step.

    permutation (NB,): of the total batch. parts: batch norm sees a worker's images in so many equal parts, as if each
    were the batch of a worker: part p of worker w is worker w * parts + p's share.
    """

    def __init__(self, workers: Workers, permutation: torch.Tensor, parts: int = 1):
        self.workers, self.permutation, self.parts = workers, permutation, parts
        self.rank, self.size = workers.rank(), workers.size()

    def send(self, images: torch.Tensor) -> Any:
        """Begin to send this worker's key images (B, ...) to where they are encoded; `receive` takes the result."""
        B, first = images.shape[0], self.rank * images.shape[0]
        mine = order(self.permutation, self.size)  # (N, B)
        divided = order(self.permutation, self.size * self.parts)  # (N x parts, B / parts)
        held = (mine >= first) & (mine < first + B)
        counts = held.sum(1).tolist()  # images for each worker
        leaving = mine[held] - first  # (B,), by worker, then ascending
        wanted = divided.view(self.size, -1)[self.rank]  # (B,), part by part
        arrived = torch.searchsorted(mine[self.rank], wanted)  # (B,)
        back = divided.flatten().argsort()  # (NB,)
        # One copy for all indices of the step, before any of its passes.
        indices = to_device(torch.cat([leaving, arrived, back]), images.device)
        leaving, self.arrived, self.back = indices.split([B, B, len(back)])
        return self.workers.begin_exchange(images.contiguous()[leaving], counts, "moco.shuffle")

    def receive(self, sent: Any) -> torch.Tensor:
        """Return the images that this worker encodes, (parts, B / parts, ...)."""
        received = self.workers.wait(sent)
        return received[self.arrived.view(self.parts, -1)]

    def spread(self, keys: torch.Tensor) -> Any:
        """Begin to send this worker's keys (B, dim), part by part, to all; `gather` takes the result."""
        return self.workers.begin_gather(keys, "moco.keys")

    def gather(self, sent: Any) -> torch.Tensor:
        """Return the keys (NB, dim) of the total batch, by position."""
        gathered = self.workers.wait(sent)  # (NB, dim), in the order of `order`
        return gathered[self.back]

    def own(self, keys: torch.Tensor, part: int) -> torch.Tensor:
        """Return the keys (b, dim) of a part of this worker's own images, of those of the total batch (NB, dim)."""
        return keys.view(self.size, self.parts, -1, keys.shape[1])[self.rank, part]
