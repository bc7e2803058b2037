"""Digests of tensors. tests/workers compares several workers."""

import pytest
import torch

from job.cluster import comm
from job.engine.replicas import check, digest
from job.engine.resume import check_finite

ODD = 7  # values; 7 values of 16 bits are not a multiple of 32 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_digest_changes_with_each_value_and_order(dtype):
    value = torch.arange(1, ODD + 1).to(dtype)
    others = [value.clone() for _ in range(ODD)]
    for index, other in enumerate(others):
        other[index] = 100
    others.append(value.flip(0))
    digests = {digest(each).item() for each in (value, *others)}
    assert len(digests) == ODD + 2


def test_digest_does_not_depend_on_strides():
    value = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(digest(value), digest(value.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    "work, name",
    [
        (lambda: check({"weight": torch.ones(2)}, "now"), "agreement"),
        (lambda: check_finite([torch.ones(2)], 0, 1), "parameters"),
    ],
)
def test_check_waits_are_visible_to_the_watchdog(work, name, monkeypatch):
    seen, read = [], torch.Tensor.cpu

    def cpu(tensor):
        seen.append(comm.waits.name)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    work()
    assert seen == [name] and comm.waits is None
