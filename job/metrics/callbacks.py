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
    """Receives a run's records. The methods do nothing: a subclass overrides those that it needs.

    An error in a method ends no run. The run warns once, and continues without the callback.
    KeyboardInterrupt stops the run, after a save, as Ctrl-C does.
    """

    def begin(self, options: dict[str, Any], folder: str) -> None:
        """Receive a run's options and folder, before its first record; of a resume as well."""

    def record(self, record: dict[str, Any]) -> None:
        """Receive a line of metrics.jsonl that was written (job/metrics/schema.py has kinds)."""

    def end(self, how: str) -> None:
        """Receive how the process ends: `complete`, `stopped` (by a signal) or `error`."""


def load(names: Iterable[str], given: Iterable[Callback] = ()) -> list[Callback]:
    """Return the callbacks that --log-to names, and the given ones.

    RunError: a package is missing, or an object is no callback.
    """
    found = {f"--log-to {name}": find(name) for name in names}
    found |= {f"callback {number}": callback for number, callback in enumerate(given, 1)}
    for shown, callback in found.items():
        if lacking := [name for name in METHODS if not callable(getattr(callback, name, None))]:
            kind = type(callback).__name__
            fix = "Derive its class from job.metrics.callbacks.Callback"
            problem = f"{kind} has no method {lacking[0]!r}"
            raise RunError(f"{shown}: {problem}; expected a callback. {fix}")
    return list(found.values())


def find(name: str) -> Callback:
    """Return the callback that a name of --log-to stands for."""
    find_own_modules()
    try:
        return pkgutil.resolve_name(TRACKERS.get(name, name))()
    except RunError:
        raise
    except Exception as error:
        expected = "expected module:name of a function without arguments"
        raise RunError(f"--log-to {name}: {error}; {expected} that returns a callback") from None


def tracker_file(folder: str, name: str) -> str:
    """Return the path of the file that has a run's id at the tracker `name`, and the steps sent."""
    return os.path.join(folder, f"{name}.json")


def forget_trackers(folder: str) -> None:
    """Remove the trackers' files of an earlier run in a folder, so that a new run starts there."""
    for name in TRACKERS:
        if os.path.lexists(path := tracker_file(folder, name)):
            os.remove(path)
