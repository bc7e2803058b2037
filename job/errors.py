"""The error for people: one line that names the value, what was expected and what to do."""

import contextlib
from collections.abc import Iterator

from job.text import printable

LONGEST = 1000  # characters of a line: longer ones lose their middle, as values have any length


class RunError(Exception):
    """End the program with one line, printed once, and the exit code `code`.

    code: 2 if options, data or files are at fault.
    """

    def __init__(self, message: str, code: int = 2):
        line = printable(message.replace("\n", " "))
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)
        self.code = code


@contextlib.contextmanager
def of_option(option: str, value: str) -> Iterator[None]:
    """Name the option before an error that begins with its value: `--teacher FILE: problem`."""
    try:
        yield
    except RunError as error:
        if type(error) is not RunError or not str(error).startswith(printable(value)):
            raise
        raise RunError(f"{option} {error}", error.code) from None


class WorkerError(RunError):
    """An error that only one worker has: this worker prints it, and ends at once."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message, code)


class StartError(RunError):
    """An error in the start of one task, not always rank 0, which others do not detect."""
