"""The short form of a parametrized test: some of its parameters."""

import pytest


def short(parameters, *names):
    """Mark the parameters with these names as `short`. Return all parameters in their order.

    The name of a parameter is its attribute `name`, or the parameter itself.
    """
    by_name = {getattr(parameter, "name", parameter): parameter for parameter in parameters}
    assert len(by_name) == len(list(parameters)) and by_name.keys() >= set(names), names
    return [
        pytest.param(parameter, marks=[pytest.mark.short] if name in names else [])
        for name, parameter in by_name.items()
    ]
