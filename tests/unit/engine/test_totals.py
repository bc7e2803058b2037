"""Sums of a step's scalars, on one worker. tests/pretended tests them on a GPU."""

import torch

from job.engine.totals import totals

CPU = torch.device("cpu")


def test_totals_keep_names_order_and_digits():
    values = {
        "loss": torch.tensor(0.1),
        "stop": True,
        "rate": 0.1,
        "count": 2**40 + 1,
        "large": torch.tensor(2**53 - 1),
    }
    sums = totals(values, CPU)
    assert list(sums) == list(values)
    expected = {
        "loss": torch.tensor(0.1).item(),
        "stop": 1.0,
        "rate": 0.1,
        "count": 2.0**40 + 1,
        "large": 2.0**53 - 1,
    }
    assert sums == expected


def test_totals_sum_a_single_number():
    assert totals({"missing": 3}, CPU) == {"missing": 3.0}
