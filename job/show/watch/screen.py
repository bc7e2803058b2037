"""A terminal's second screen, which leaves the first as it was: after the end, while stopped by Ctrl-Z, and after signals."""

import os
import select
import signal
import sys


class Screen:
    """The second screen, from `with` to its end."""

    def __enter__(self) -> "Screen":
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer)  # so that `wait` hears of signals
        self.before = {
            number: signal.signal(number, self.end) for number in (signal.SIGTERM, signal.SIGHUP)
        }
        self.before[signal.SIGINT] = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background has it ignored
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
        """End the program as shells tell it of a signal."""
        sys.exit(128 + number)

    def show(self) -> None:
        """Change to the second screen, without wrapping and cursor."""
        print("\033[?1049h\033[?7l\033[?25l", end="", flush=True)

    def hide(self) -> None:
        """Change back to the first."""
        print("\033[?25h\033[?7h\033[?1049l", end="", flush=True)

    def draw(self, lines: list[str], height: int) -> None:
        """Write over what is there."""
        if len(lines) > height - 1:
            lines = [
                *lines[: height - 2],
                f"({len(lines) - height + 2} more lines: a taller window, or --once, shows them)",
            ]
        print(
            "\033[H" + "".join(f"{line}\033[K\n" for line in lines) + "\033[J", end="", flush=True
        )

    def wait(self, seconds: float) -> None:
        """Wait, but not when the window has changed its size; stop when Ctrl-Z says so."""
        if select.select([self.reader], [], [], seconds)[0] and signal.SIGTSTP in os.read(
            self.reader, 1024
        ):
            self.hide()
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(
                os.getpid(), signal.SIGTSTP
            )  # goes on here; without a shell that could, it does not stop
            signal.signal(signal.SIGTSTP, handler)
            self.show()
