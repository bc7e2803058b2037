"""Momentum Contrast: a query encoder, a momentum key encoder and a queue of negatives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moco.queue import enqueue
from moco.shuffle import Shuffle, Workers

HEAD = "fc"  # the output of the query encoder in the contrastive loss


class Contrast(NamedTuple):
    """The results of a forward pass over b images."""

    logits: torch.Tensor  # (b, 1 + K), positive first, divided by the temperature
    queries: torch.Tensor  # (b, dim), L2-normalised
    encoded: dict[str, torch.Tensor]  # all outputs of the query encoder, by name


class MoCo(nn.Module):
    """MoCo v1 (arXiv 1911.05722, algorithm 1) and v2 (arXiv 2003.04297).

    Its state has the tensor names of the released checkpoints.

    workers: the collectives of the workers.
    query: the query encoder. It returns outputs by name, among them "fc" (b, dim).
    key: the key encoder, with the same parameters. It returns only "fc" (b, dim).
    K: number of negatives in the queue. m: momentum of the key encoder. T: softmax temperature.
    normalize: converts images as the workers exchange them to the encoders' input (b, 3, H, W).
    """

    queue: torch.Tensor  # (dim, K)
    queue_ptr: torch.Tensor  # (1,), the position of the next key

    def __init__(
        self,
        workers: Workers,
        query: nn.Module,
        key: nn.Module,
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        normalize: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    ):
        super().__init__()
        self.workers, self.m, self.T, self.normalize = workers, m, T, normalize
        self.encoder_q, self.encoder_k = query, key
        self.encoder_k.load_state_dict(query.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def keys(self, images: torch.Tensor, permutation: torch.Tensor, parts: int = 1) -> "Keys":
        """Update the key encoder and start sending a step's key views to their encoding workers.

        images (B, 3, H, W). permutation (NB,): the step's shuffle of the total batch. parts: number
        of micro-batches in a worker's batch.
        """
        update_by_momentum(self.encoder_k, self.encoder_q, self.m)
        return Keys(
            lambda received: self.encoder_k(self.normalize(received)),
            images,
            Shuffle(self.workers, permutation, parts),
            self.queue.dtype,
        )

    def forward(self, query: torch.Tensor, keys: "Keys", part: int = 0) -> Contrast:
        """Contrast a micro-batch of query views (b, 3, H, W) with its keys.

        keys: the keys of the step. part: the index of the micro-batch. Under autocast the encoders
        compute in its precision. The logits have the queue's dtype.
        """
        keys.encode()  # first, so that the keys travel during the queries' forward pass
        encoded = self.encoder_q(self.normalize(query))
        q = F.normalize(encoded[HEAD].to(self.queue.dtype), dim=1)  # (b, dim)
        positive = (q * keys.own(part)).sum(1, keepdim=True)  # (b, 1)
        with torch.autocast(query.device.type, enabled=False):
            negative = q @ self.queue  # (b, K)
        return Contrast(torch.cat([positive, negative], dim=1) / self.T, q.detach(), encoded)

    def enqueue(self, keys: torch.Tensor) -> None:
        """Enqueue a step's keys (NB, dim), the same on every worker.

        Call it after the backward pass, because that reads the queue.
        """
        enqueue(self.queue, self.queue_ptr, keys)


class Keys:
    """The keys of a step.

    Workers exchange the key images, encode the received ones, and send the keys to all workers.
    """

    def __init__(
        self,
        encoder: Callable[[torch.Tensor], torch.Tensor],
        images: torch.Tensor,
        shuffle: Shuffle,
        dtype: torch.dtype,
    ):
        self.encoder, self.shuffle, self.dtype = encoder, shuffle, dtype
        self.images = shuffle.send(images)
        self.keys: Any = None

    @torch.no_grad()
    def encode(self) -> Any:
        """Encode the received images and start sending their keys, at the first call only.

        Return the pending collective for `Shuffle.gather`.
        """
        if self.keys is None:
            received = self.shuffle.receive(self.images)  # parts x (b, 3, H, W)
            k = torch.cat([self.encoder(images) for images in received])
            self.keys = self.shuffle.spread(F.normalize(k.to(self.dtype), dim=1))
        return self.keys

    @functools.cached_property
    def total(self) -> torch.Tensor:
        """The keys of all workers, (NB, dim), in the order of the images in the total batch."""
        return self.shuffle.gather(self.encode())

    def own(self, part: int) -> torch.Tensor:
        """Return the keys (b, dim) of a micro-batch of this worker."""
        return self.shuffle.own(self.total, part)


@torch.no_grad()
def update_by_momentum(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """Set key = momentum * key + (1 - momentum) * query, for all parameters.

    Source: arXiv 1911.05722, eq. 2.
    """
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1.0 - momentum)
