"""Momentum Contrast: a query encoder, a key encoder that follows it by momentum, and a queue of negatives."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from job.data.augment import normalize
from moco.encoder import build_resnet, update_by_momentum, with_features
from moco.queue import enqueue
from moco.shuffle import Shuffle, Workers


class MoCo(nn.Module):
    """MoCo v1 (arXiv 1911.05722, algorithm 1) and v2 (2003.04297); its state has the names of the released checkpoints.

    stages: stages of the query encoder whose features before the last ReLU `forward` gives as well.
    workers: what the workers send each other. K: negatives in the queue; m: momentum of the key encoder; T: softmax temperature.
    first: how a network begins, as `build_resnet` has it.
    queries: of the last forward pass, (b, dim), for those who watch the training.
    """

    queue: torch.Tensor  # (dim, K)
    queue_ptr: torch.Tensor  # (1,), the place of the next key

    def __init__(
        self,
        workers: Workers,
        arch: str,
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        stages: Sequence[int] = (),
        **first: Any,
    ):
        super().__init__()
        self.workers, self.m, self.T, self.stages = workers, m, T, list(stages)
        query = build_resnet(arch, dim, mlp, **first)
        self.encoder_q = with_features(query, self.stages)
        self.encoder_k = build_resnet(arch, dim, mlp, **first)
        self.encoder_k.load_state_dict(query.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def keys(self, images: torch.Tensor, permutation: torch.Tensor, parts: int = 1) -> "Keys":
        """Move the key encoder on, and let a step's key views (B, 3, H, W), uint8 or normalised, travel to be encoded.

        permutation (NB,): the step's shuffle of the total batch.
        """
        update_by_momentum(self.encoder_k, self.encoder_q, self.m)
        return Keys(self.encoder_k, images, Shuffle(self.workers, permutation, parts), self.queue.dtype)

    def forward(self, query: torch.Tensor, keys: "Keys", part: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the logits (b, 1 + K), positive first, over the temperature, and the features of `stages`, (b, C, H, W).

        query (b, 3, H, W): a part of this worker's images, uint8 or normalised; keys: the step's, of which it takes
        those of its part. Under autocast the encoders compute in its precision; logits have the queue's all the same.
        """
        keys.encode()  # before the queries, while whose pass the keys travel
        encoded = self.encoder_q(normalize(query))
        q = F.normalize(encoded["fc"].to(self.queue.dtype), dim=1)  # (b, dim)
        self.queries = q.detach()
        positive = (q * keys.own(part)).sum(1, keepdim=True)  # (b, 1)
        with torch.autocast(query.device.type, enabled=False):
            negative = q @ self.queue  # (b, K)
        logits = torch.cat([positive, negative], dim=1) / self.T
        return logits, [encoded[f"layer{stage}"] for stage in self.stages]

    def enqueue(self, keys: torch.Tensor) -> None:
        """Put a step's keys (NB, dim) into the queue, the same on every worker; after the backward pass, which reads it."""
        enqueue(self.queue, self.queue_ptr, keys)


class Keys:
    """The keys of a step: their images set out at once, are encoded where they arrive, and the keys travel to all."""

    def __init__(self, encoder: nn.Module, images: torch.Tensor, shuffle: Shuffle, dtype: torch.dtype):
        self.encoder, self.shuffle, self.dtype = encoder, shuffle, dtype
        self.images = shuffle.send(images)
        self.keys: Any = None

    @torch.no_grad()
    def encode(self) -> Any:
        """Encode the images that arrive here, once, and begin to send their keys; return what `Shuffle.gather` takes."""
        if self.keys is None:
            received = self.shuffle.receive(self.images)  # parts x (b, 3, H, W)
            k = torch.cat([self.encoder(normalize(images)) for images in received])
            self.keys = self.shuffle.spread(F.normalize(k.to(self.dtype), dim=1))
        return self.keys

    @functools.cached_property
    def total(self) -> torch.Tensor:
        """All workers' keys, (NB, dim), by their images' positions in the total batch."""
        return self.shuffle.gather(self.encode())

    def own(self, part: int) -> torch.Tensor:
        """The keys (b, dim) of a part of this worker's own images."""
        return self.shuffle.own(self.total, part)
