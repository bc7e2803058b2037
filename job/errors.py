"""The error for people: one line that names the value, what was expected and what to do."""

from job.text import printable

LONGEST = (
    1000  # characters of a line; of a longer one the middle is left out: values may have any length
)


class RunError(Exception):
    """Ends the program with its message as one line, said once, and with `code`: 2 for a mistake of the user's."""

    def __init__(self, message: str, code: int = 2):
        line = printable(message.replace("\n", " "))
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)
        self.code = code


class WorkerError(RunError):
    """An error that only one worker has: this worker prints it, and ends at once."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message, code)


class StartError(RunError):
    """An error of one task's start, which the others know nothing of: not always rank 0's."""
