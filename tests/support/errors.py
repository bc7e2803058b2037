"""The error of a user's mistake, as a function raises it."""

import pytest

from job.errors import RunError


def refused(call, *args, **named):
    """Return the message with which a call raises RunError: one line, with exit code 2."""
    with pytest.raises(RunError) as caught:
        call(*args, **named)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2
    return str(caught.value)
