"""Hits of a classifier."""

import torch

from job.linear import hits


def test_hits_are_counted_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.2, 0.1]])
    labels = torch.tensor([1, 2, -1])
    assert [int(hits(logits, labels, k)) for k in (1, 2, 5)] == [1, 2, 2]
