"""Shuffled batch norm (arXiv 1911.05722, section 3.3): keys are encoded beside other images than their queries.

The total batch of N workers has positions 0..NB-1; worker r holds [rB, (r+1)B). A permutation of them that
all workers know gives worker w the positions permutation[wB:(w+1)B], which it encodes in ascending order:
that is the order in which an alltoall brings them. So an image travels once, and its key comes back once.
"""

import horovod.torch as hvd
import torch


def order(permutation: torch.Tensor, size: int) -> torch.Tensor:
    """Return (N, B): row w has the positions that worker w encodes, ascending."""
    return permutation.view(size, -1).sort(dim=1).values


def send(images: torch.Tensor, permutation: torch.Tensor) -> int:
    """Start sending this worker's key images (B, ...) to where they are encoded; `receive` takes the handle."""
    B, first = images.shape[0], hvd.rank() * images.shape[0]
    mine = order(permutation, hvd.size())  # (N, B)
    held = (mine >= first) & (mine < first + B)
    splits = held.sum(1).to(torch.int32)  # images for each worker
    leaving = images.contiguous()[(mine[held] - first).to(images.device)]  # by worker, then ascending
    return hvd.alltoall_async(leaving, splits=splits, name="moco.shuffle")


def receive(travelling: int, permutation: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Return the images that this worker encodes, (parts, B / parts, ...): part p of worker w is worker w * parts + p's share."""
    received, _ = hvd.synchronize(travelling)
    arrived = order(permutation, hvd.size())[hvd.rank()]  # (B,), ascending
    wanted = order(permutation, hvd.size() * parts).view(hvd.size(), parts, -1)[hvd.rank()]  # (parts, B / parts)
    return received[torch.searchsorted(arrived, wanted).to(received.device)]


def spread(keys: torch.Tensor) -> int:
    """Start sending this worker's keys (B, dim), part by part, to all; `gather` takes the handle."""
    return hvd.allgather_async(keys, name="moco.keys")


def gather(travelling: int, permutation: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Return the keys (NB, dim) of the total batch, by position."""
    gathered = hvd.synchronize(travelling)  # (NB, dim), in the order of `order`
    back = order(permutation, hvd.size() * parts).flatten().argsort()
    return gathered[back.to(gathered.device)]
