"""The sums of a step's scalars, on one worker; tests/pretended has a GPU's."""

import torch

from job.engine.totals import totals

CPU = torch.device("cpu")


def test_numbers_keep_names_order_and_all_digits():
    values = {
        "loss": torch.tensor(0.1),
        "stop": True,
        "rate": 0.1,
        "count": 2**40 + 1,
        "large": torch.tensor(2**53 - 1),
    }
    found = totals(values, CPU)
    assert list(found) == list(values)
    expected = {
        "loss": torch.tensor(0.1).item(),
        "stop": 1.0,
        "rate": 0.1,
        "count": 2.0**40 + 1,
        "large": 2.0**53 - 1,
    }
    assert found == expected


def test_a_single_number_is_summed():
    assert totals({"missing": 3}, CPU) == {"missing": 3.0}
