"""The errors for people: one line, and the option of a value."""

import pytest

from job.errors import RunError, WorkerError, of_option


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RunError("a b.pth: no such file", 1), "--teacher a b.pth: no such file"),
        (RunError("--teacher-size 3: expected 8"), "--teacher-size 3: expected 8"),
        (WorkerError("a b.pth: is gone"), "a b.pth: is gone"),
    ],
)
def test_of_option_names_the_option_of_a_value(raised, expected):
    with pytest.raises(RunError) as caught, of_option("--teacher", "a b.pth"):
        raise raised
    assert (str(caught.value), caught.value.code) == (expected, raised.code)
    assert type(caught.value) is type(raised)


def test_of_option_knows_an_unprintable_value():
    path = "a\x1b.pth"
    with pytest.raises(RunError, match="^--teacher a"), of_option("--teacher", path):
        raise RunError(f"{path}: no such file")
