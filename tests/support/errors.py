"""Expected errors of a user's mistake."""

import pytest

from job.errors import RunError


def refused(call, *args, **named):
    """Return the message of the RunError that a call must raise: one line, exit code 2."""
    with pytest.raises(RunError) as caught:
        call(*args, **named)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2
    return str(caught.value)
