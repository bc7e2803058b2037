"""Sums of a step's scalars on a pretended GPU."""

import pytest
import torch

from job.cluster import comm
from job.engine.totals import totals
from pretended_gpu import CUDA

VALUES = {
    "both": {"stop": True, "loss": 0.5, "count": 2**40 + 1},
    "numbers": {"stop": False, "count": 3},
    "tensors": {"loss": 0.5, "gradient": 0.25},
}


@pytest.mark.parametrize("case", VALUES)
def test_totals_read_once(gpu, monkeypatch, case):
    monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
    expected = VALUES[case]
    on_device = ("loss", "gradient")
    values = {
        name: torch.tensor(value, device=CUDA) if name in on_device else value
        for name, value in expected.items()
    }
    gpu.clear()
    assert totals(values, CUDA) == expected
    assert gpu.copies.total() == 1 and not gpu.waits and not gpu.problems


@pytest.mark.parametrize("second", [torch.tensor(2.0), 2])
def test_totals_keep_the_order_of_values(gpu, monkeypatch, second):
    """A worker without images has a number where others have a tensor of the device."""
    sent = []
    monkeypatch.setattr(comm, "total", lambda tensor, name: sent.append(tensor.tolist()) or tensor)
    second = second.to(CUDA) if torch.is_tensor(second) else second
    totals({"first": 1, "second": second, "third": torch.tensor(3.0)}, CUDA)
    assert sent == [[1, 2, 3]]
