"""Momentum Contrast: a query encoder, a key encoder that follows it by momentum, and a queue of negatives."""

from collections.abc import Sequence

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import nn

from moco import shuffle
from moco.augment import normalize
from moco.encoder import build_resnet, update_by_momentum, with_features
from moco.queue import enqueue


class MoCo(nn.Module):
    """MoCo v1 and v2; its state has the names of the released checkpoints.

    stages: stages of the query encoder whose features before the last ReLU `forward` gives as well.
    K: negatives in the queue; m: momentum of the key encoder; T: softmax temperature.
    """

    def __init__(
        self,
        arch: str,
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        stem: str = "imagenet",
        stages: Sequence[int] = (),
    ):
        super().__init__()
        self.m, self.T, self.stages = m, T, list(stages)
        query = build_resnet(arch, dim, mlp, stem)
        self.encoder_q = with_features(query, self.stages)
        self.encoder_k = build_resnet(arch, dim, mlp, stem)
        self.encoder_k.load_state_dict(query.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, permutation: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Encode the two views of this worker's images.

        query, key (B, 3, H, W): uint8, or normalised floats. permutation (NB,): the step's shuffle of the
        total batch. Returns logits (B, 1 + K), positive first, over the temperature; the features of
        `stages`, each (B, C, H, W); and the keys of the total batch (NB, dim), for `enqueue`. Under autocast
        the encoders compute in its precision; logits and keys have the queue's all the same.
        """
        travelling = shuffle.send(key, permutation)
        encoded = self.encoder_q(normalize(query))
        q = F.normalize(encoded["fc"].to(self.queue.dtype), dim=1)  # (B, dim)

        with torch.no_grad():
            update_by_momentum(self.encoder_k, self.encoder_q, self.m)
            received, _ = hvd.synchronize(travelling)
            k = F.normalize(self.encoder_k(normalize(received)).to(self.queue.dtype), dim=1)
            keys = shuffle.gather(k, permutation)  # (NB, dim)
            k = keys.view(hvd.size(), -1, keys.shape[1])[hvd.rank()]  # (B, dim), of this worker's images

        positive = (q * k).sum(1, keepdim=True)  # (B, 1)
        with torch.autocast(query.device.type, enabled=False):
            negative = q @ self.queue  # (B, K)
        logits = torch.cat([positive, negative], dim=1) / self.T
        return logits, [encoded[f"layer{stage}"] for stage in self.stages], keys

    def enqueue(self, keys: torch.Tensor) -> None:
        """Put a step's keys (NB, dim) into the queue, the same on every worker; after the backward pass, which reads it."""
        enqueue(self.queue, self.queue_ptr, keys)
