"""How the programs that look at runs end: errors in one line, Ctrl-C without one."""

import contextlib
import sys
from collections.abc import Iterator

from job import output
from job.errors import RunError


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Exit with the code of a RunError that is raised within, and print it."""
    with output.guarded():
        try:
            yield
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.code)
        except KeyboardInterrupt:
            sys.exit(130)
