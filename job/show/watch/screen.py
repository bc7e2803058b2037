"""The terminal's second screen, which keeps the first as it was.

It is left at the end, while stopped by Ctrl-Z, and after signals.
"""

import os
import select
import signal
import sys


class Screen:
    """The second screen, as a context manager."""

    def __enter__(self) -> "Screen":
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer)  # signals end the select of `wait`
        self.before = {
            number: signal.signal(number, self.end) for number in (signal.SIGTERM, signal.SIGHUP)
        }
        # A shell starts background programs with SIGINT ignored.
        self.before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
            self.before[number] = signal.signal(number, lambda *_: None)
        self.show()
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @staticmethod
    def end(number: int, _: object) -> None:
        """Exit with the code that shells report for a signal."""
        sys.exit(128 + number)

    def show(self) -> None:
        """Change to the second screen. Turn off line wrapping and the cursor."""
        print("\033[?1049h\033[?7l\033[?25l", end="", flush=True)

    def hide(self) -> None:
        """Change back to the first screen."""
        print("\033[?25h\033[?7h\033[?1049l", end="", flush=True)

    def draw(self, lines: list[str], height: int) -> None:
        """Replace the content of the screen."""
        if len(lines) > height - 1:
            lines = [
                *lines[: height - 2],
                f"({len(lines) - height + 2} more lines; use a taller window, or --once)",
            ]
        print(
            "\033[H" + "".join(f"{line}\033[K\n" for line in lines) + "\033[J", end="", flush=True
        )

    def wait(self, seconds: float) -> None:
        """Wait, or return early if the window changes its size. Ctrl-Z stops the program here."""
        if select.select([self.reader], [], [], seconds)[0] and signal.SIGTSTP in os.read(
            self.reader, 1024
        ):
            self.hide()
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            # Returns when the program continues, or at once if no shell could continue it.
            os.kill(os.getpid(), signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, handler)
            self.show()
