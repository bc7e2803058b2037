"""Exit codes and error lines of the programs that show runs."""

import contextlib
import sys
from collections.abc import Iterator

from job import output
from job.errors import RunError


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn a RunError into an error line and its exit code, and Ctrl-C into exit code 130."""
    with output.guarded():
        try:
            yield
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.code)
        except KeyboardInterrupt:
            sys.exit(130)
