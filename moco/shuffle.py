"""Shuffled batch norm (arXiv 1911.05722, section 3.3): keys and queries are in different batches.

The total batch of N workers has positions 0..NB-1, and worker r holds [rB, (r+1)B). All workers
have the same permutation of them. Worker w encodes the positions permutation[wB:(w+1)B] in
ascending order, the order in which an alltoall delivers them. So each image and each key is sent
only once.
"""

from typing import Any, Protocol

import torch

from moco.copies import to_device


class Workers(Protocol):
    """The workers' collectives, each with a name. job/cluster/comm.py implements them."""

    def rank(self) -> int:
        """Return the rank of this worker, from 0."""

    def size(self) -> int:
        """Return the number of workers."""

    def begin_exchange(self, tensor: torch.Tensor, counts: list[int], name: str) -> Any:
        """Start sending counts[w] rows of a tensor to each worker w, in row order."""

    def begin_gather(self, tensor: torch.Tensor, name: str) -> Any:
        """Start gathering the rows of all workers, in order of rank."""

    def wait(self, pending: Any) -> torch.Tensor:
        """Wait for a pending collective and return its result."""


def order(permutation: torch.Tensor, size: int) -> torch.Tensor:
    """Return (N, B): row w has the positions that worker w encodes, in ascending order."""
    return permutation.view(size, -1).sort(dim=1).values


class Shuffle:
    """The shuffle of one step.

    permutation (NB,): of the total batch. parts: number of equal parts into which a worker's images
    are divided for batch norm. Part p of worker w has the images that worker w * parts + p would
    have among N x parts workers.
    """

    def __init__(self, workers: Workers, permutation: torch.Tensor, parts: int = 1):
        self.workers, self.permutation, self.parts = workers, permutation, parts
        self.rank, self.size = workers.rank(), workers.size()

    def send(self, images: torch.Tensor) -> Any:
        """Start sending this worker's key images (B, ...) to their encoding workers.

        Return the pending collective for `receive`.
        """
        B, first = images.shape[0], self.rank * images.shape[0]
        mine = order(self.permutation, self.size)  # (N, B)
        divided = order(self.permutation, self.size * self.parts)  # (N x parts, b)
        held = (mine >= first) & (mine < first + B)
        counts = held.sum(1).tolist()  # images for each worker
        leaving = mine[held] - first  # (B,), by worker, then ascending
        needed = divided.view(self.size, -1)[self.rank]  # (B,), part by part
        arrived = torch.searchsorted(mine[self.rank], needed)  # (B,)
        back = divided.flatten().argsort()  # (NB,)
        # One copy for all indices of the step, before any of its passes.
        indices = to_device(torch.cat([leaving, arrived, back]), images.device)
        leaving, self.arrived, self.back = indices.split([B, B, len(back)])
        return self.workers.begin_exchange(images.contiguous()[leaving], counts, "moco.shuffle")

    def receive(self, sent: Any) -> torch.Tensor:
        """Return the images that this worker encodes, (parts, b, ...)."""
        received = self.workers.wait(sent)
        return received[self.arrived.view(self.parts, -1)]

    def spread(self, keys: torch.Tensor) -> Any:
        """Start sending this worker's keys (B, dim), part by part, to all workers.

        Return the pending collective for `gather`.
        """
        return self.workers.begin_gather(keys, "moco.keys")

    def gather(self, sent: Any) -> torch.Tensor:
        """Return the keys (NB, dim) of the total batch, by position."""
        gathered = self.workers.wait(sent)  # (NB, dim), in the order of `order`
        return gathered[self.back]

    def own(self, keys: torch.Tensor, part: int) -> torch.Tensor:
        """Return the keys (b, dim) of one part of this worker's images.

        keys: of the total batch, (NB, dim).
        """
        return keys.view(self.size, self.parts, -1, keys.shape[1])[self.rank, part]
