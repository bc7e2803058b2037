"""Callbacks: a user's objects that receive a run's records while it trains, on rank 0 only."""

import os
import pkgutil
from collections.abc import Iterable
from typing import Any

from job.errors import RunError
from job.files import find_own_modules
from job.options import TRACKERS

METHODS = ("begin", "record", "end")


class Callback:
    """Receive a run's records. The methods do nothing, so override those that you need.

    If a method raises an error, the run warns once and continues without the callback. If it
    raises KeyboardInterrupt, the run saves and stops, as after Ctrl-C.
    """

    def begin(self, options: dict[str, Any], folder: str) -> None:
        """Receive a run's options and folder, before its first record, also in a resume."""

    def record(self, record: dict[str, Any]) -> None:
        """Receive a record that was written to metrics.jsonl (kinds: job/metrics/schema.py)."""

    def end(self, how: str) -> None:
        """Receive the cause of the end: `complete`, `stopped` (by a signal) or `error`."""


def load(names: Iterable[str], given: Iterable[Callback] = ()) -> list[Callback]:
    """Return the callbacks of --log-to, and the given ones.

    RunError: a package is missing, or an object is not a callback.
    """
    callbacks = {f"--log-to {name}": find(name) for name in names}
    callbacks |= {f"callback {number}": callback for number, callback in enumerate(given, 1)}
    for shown, callback in callbacks.items():
        if lacking := [name for name in METHODS if not callable(getattr(callback, name, None))]:
            kind = type(callback).__name__
            fix = "Derive its class from job.metrics.callbacks.Callback"
            problem = f"{kind} has no method {lacking[0]!r}"
            raise RunError(f"{shown}: {problem}; expected a callback. {fix}")
    return list(callbacks.values())


def find(name: str) -> Callback:
    """Return a new callback for a name of --log-to."""
    find_own_modules()
    try:
        return pkgutil.resolve_name(TRACKERS.get(name, name))()
    except RunError:
        raise
    except Exception as error:
        expected = "expected module:name of a function without arguments"
        raise RunError(f"--log-to {name}: {error}; {expected} that returns a callback") from None


def tracker_file(folder: str, name: str) -> str:
    """Return the path of the file with a run's id in the tracker `name`, and the steps sent."""
    return os.path.join(folder, f"{name}.json")


def forget_trackers(folder: str) -> None:
    """Remove the trackers' files of an earlier run, so that a new run starts there."""
    for name in TRACKERS:
        if os.path.lexists(path := tracker_file(folder, name)):
            os.remove(path)
