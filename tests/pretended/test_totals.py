"""A step's scalars on a GPU that is only pretended."""

import pytest
import torch

from job.engine.totals import totals
from pretended_gpu import CUDA

VALUES = {
    "both": {"stop": True, "loss": 0.5, "count": 2**40 + 1},
    "numbers": {"stop": False, "count": 3},
    "tensors": {"loss": 0.5, "gradient": 0.25},
}


@pytest.mark.parametrize("case", VALUES)
def test_the_host_reads_once(gpu, monkeypatch, case):
    monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")
    expected = VALUES[case]
    on_device = ("loss", "gradient")
    values = {name: torch.tensor(value, device=CUDA) if name in on_device else value for name, value in expected.items()}
    gpu.clear()
    assert totals(values, CUDA) == expected
    assert gpu.copies.total() == 1 and not gpu.waits and not gpu.problems
