"""Distillers of pooled features under autocast: after the heads they compute in float32."""

import pytest
import torch
from distillers import HEAD, B, S, T, build, features

from job.distill.momentum import MOMENTUM

CASES = [
    ("simreg", {}, T),
    ("similarity", {"similarity": "headless", "similarity_k": 9}, T),
    ("similarity", {"similarity": "seed", "similarity_k": 9}, HEAD),
    ("similarity", {"similarity": "compress", "similarity_k": 9}, S),
    ("disco", {}, HEAD),
]


@pytest.mark.parametrize(("name", "options", "outputs"), CASES)
def test_bf16_rounds_only_network_outputs(name, options, outputs, monkeypatch):
    """With the same outputs, targets and loss have the same bits as without autocast."""
    distiller = build(name, **options)
    student, teacher = features(S, 1), features(T, 2, HEAD)
    followed = {MOMENTUM: torch.rand(B, S, generator=torch.Generator().manual_seed(4))}
    rounded = {key: value.bfloat16() for key, value in teacher.items()}
    predicted = torch.randn(B, outputs, generator=torch.Generator().manual_seed(3)).bfloat16()
    actual = []
    for enabled in (True, False):
        dtype = torch.bfloat16 if enabled else torch.float32
        head = distiller.module.get_submodule("head")
        monkeypatch.setattr(head, "forward", lambda pooled, dtype=dtype: predicted.to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            given = followed | {key: value.to(dtype) for key, value in rounded.items()}
            targets = distiller.targets(given, None)
            actual.append((targets, distiller.loss(student, targets)))
    assert all(torch.equal(*pair) for pair in zip(*actual, strict=True))
    assert {value.dtype for pair in actual for value in pair} == {torch.float32}
