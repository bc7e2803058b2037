"""Command lines of the programs, each in a process of its own that is forked after the imports, two at a time.

Reads lines of JSON, each a list of commands [program, argv, folder, unprivileged], and answers each by a line of
JSON, the outcomes in their order: {code, said, warned, seconds, peak}: exit code (None: it had to be killed), what went to
the standard output and error, wall time, and the largest memory in MB that it had by itself.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time

TIME = 90  # seconds that a command may take
AT_ONCE = 2
PROGRAMS = ("job.train", "job.linear", "job.embed", "job.export", "job.pack")


def obey_permissions() -> None:
    """Give up root's right to read everything (capset(2), version 3); other users have nothing to give up."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def run(program: str, argv: list[str]) -> int:
    """Run a program to its end; return its exit code."""
    try:
        importlib.import_module(program).main(argv)
        code = 0
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()  # all that Python's own end does but taking the modules apart, which takes two seconds
    sys.stdout.flush()
    return code


class Command:
    """A command that runs in a process of its own."""

    def __init__(self, program: str, argv: list[str], folder: str, unprivileged: bool):
        self.said, self.warned = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.begun, self.end = time.monotonic(), None
        self.process = os.fork()
        if self.process == 0:
            os.setsid()
            os.chdir(folder)
            for number, file in enumerate((open(os.devnull, "rb"), self.said, self.warned)):
                os.dup2(file.fileno(), number)
            if unprivileged:
                obey_permissions()
            os._exit(run(program, argv))

    def ended(self) -> bool:
        """Whether it has ended, or had to be, as its time was up."""
        late = time.monotonic() - self.begun > TIME
        if late:
            os.killpg(self.process, signal.SIGKILL)
        process, status, usage = os.wait4(self.process, 0 if late else os.WNOHANG)
        if process:
            code = None if late else os.waitstatus_to_exitcode(status)
            texts = {
                name: self.text(file)
                for name, file in (("said", self.said), ("warned", self.warned))
            }
            self.end = {
                "code": code,
                **texts,
                "seconds": time.monotonic() - self.begun,
                "peak": usage.ru_maxrss / 1024,
            }
        return bool(process)

    @staticmethod
    def text(file) -> str:
        """What was written to a file."""
        file.seek(0)
        return file.read().decode(errors="backslashreplace")


def run_all(commands: list[list]) -> list[dict]:
    """Run commands; return their outcomes."""
    waiting, running, all_of_them = commands[::-1], [], []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append(Command(*waiting.pop()))
            all_of_them.append(running[-1])
        running = [command for command in running if not command.ended()]
        time.sleep(0.005)
    return [command.end for command in all_of_them]


if __name__ == "__main__":
    for program in PROGRAMS:
        importlib.import_module(program)
    gc.freeze()  # a collection in a child would copy all that was imported
    resource.setrlimit(
        resource.RLIMIT_AS, (2**34, 2**34)
    )  # what would take all memory is to fail, and not to take it
    for line in sys.stdin:
        print(json.dumps(run_all(json.loads(line))), flush=True)
