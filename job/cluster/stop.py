"""The wish to stop: a signal sets it, and the next collective tells all workers."""

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


def in_main_thread() -> bool:
    """Whether Python lets this thread set signal handlers."""
    return threading.current_thread() is threading.main_thread()


class Stopped(Exception):
    """A signal has ended work between two steps, on all workers at the same place."""


class Stop:
    """Whether one of SIGNALS has come. Handlers only note it: the workers stop together at their next collective.

    Further signals change nothing: launchers and job scripts send several.
    A SIGHUP that was ignored before, as nohup leaves it, stays ignored. A handler that is not
    Python's stays. Outside the main thread, where Python cannot set handlers, no signal is noted.
    time: of the first signal, as time.monotonic() has it.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.time = 0.0
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        if not in_main_thread():
            heard = []
        known = [number for number in heard if signal.getsignal(number) is not None]
        self.before = {number: signal.signal(number, self.note) for number in known}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note that a signal has come: what the handlers do."""
        if self.signal is None:
            self.time = time.monotonic()
        self.signal = signal.Signals(number)

    def ignore(self) -> None:
        """Ignore SIGNALS until this process ends: a worker that stops for another's signal may get its own copy late."""
        self.before = dict.fromkeys(self.before, signal.SIG_IGN)
        self.restore()

    def restore(self) -> None:
        """Put back the handlers that were there before; but SIGUSR2, which ends a program by default, is not heard any more.

        A SLURM job's script sends it to all workers, again and again until they have ended, also to one that knows from another
        that they stop, or that is done: it must not end in the middle of its end.
        """
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR2 else handler)
