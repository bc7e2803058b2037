"""The error for people: one line that names the value, what was expected and what to do."""


class RunError(Exception):
    """Ends the program with its message as one line, said once, and with `code`: 2 for a mistake of the user's."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message.replace("\n", " "))
        self.code = code
