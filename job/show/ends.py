"""How the programs that look at runs end: errors in one line, Ctrl-C and a reader that has gone without one."""

import contextlib
import os
import sys
from collections.abc import Iterator

from job.errors import RunError


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Exit with the code of a RunError that is raised within, and say it."""
    try:
        yield
        sys.stdout.flush()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes it
        sys.exit(141)
