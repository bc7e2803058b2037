"""Stop requests: a signal sets one, and the next collective passes it to all workers."""

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


def in_main_thread() -> bool:
    """Return whether this is the main thread, in which Python can set signal handlers."""
    return threading.current_thread() is threading.main_thread()


class Stopped(Exception):
    """A signal has stopped the work between two steps, on all workers at the same position."""


class Stop:
    """The last of SIGNALS that this process has received, if any.

    Handlers only store the signal: the workers stop together at their next collective. Further
    signals have no effect, because launchers and job scripts send several.
    If SIGHUP was ignored before, as by nohup, it stays ignored. A handler that was not set by
    Python stays. Outside the main thread, Python cannot set handlers, so no signal is stored.

    signal: the signal, or None. time: time.monotonic() at the first one, in s.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.time = 0.0
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        handled = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        if not in_main_thread():
            handled = []
        own = [number for number in handled if signal.getsignal(number) is not None]
        self.before = {number: signal.signal(number, self.note) for number in own}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Store a signal. This is the signal handler."""
        if self.signal is None:
            self.time = time.monotonic()
        self.signal = signal.Signals(number)

    def ignore(self) -> None:
        """Ignore SIGNALS until this process ends.

        A worker that stops because of another worker's signal may receive its own copy late.
        """
        self.before = dict.fromkeys(self.before, signal.SIG_IGN)
        self.restore()

    def restore(self) -> None:
        """Restore the earlier handlers, but ignore SIGUSR2, which kills a process by default.

        The script of a SLURM job sends SIGUSR2 repeatedly until all workers have ended, also to a
        worker that is stopping or has finished. It must not kill that worker.
        """
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR2 else handler)
