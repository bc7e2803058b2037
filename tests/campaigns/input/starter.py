"""Run command lines in separate processes, two at a time, forked after the imports.

Reads lines of JSON, each a list of commands [program, argv, folder, unprivileged]. Answers each by
a line of JSON with their outcomes in the same order: {code, stdout, stderr, seconds, peak}. `code`
is the exit code (None: killed after TIME), `seconds` the wall time, and `peak` the process's peak
of memory in MB.
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

TIME = 90  # seconds, after which a command is killed
AT_ONCE = 2
PROGRAMS = ("job.train", "job.linear", "job.embed", "job.export", "job.pack")


def obey_permissions() -> None:
    """Drop root's right to read every file (capset(2), version 3). Other users lack it."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def run(program: str, argv: list[str]) -> int:
    """Run a program to its end. Return its exit code."""
    try:
        importlib.import_module(program).main(argv)
        code = 0
    except SystemExit as end:
        code = end.code
    # Python's end also clears the modules, which needs two seconds.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


class Command:
    """A command that runs in a separate process."""

    def __init__(self, program: str, argv: list[str], folder: str, unprivileged: bool):
        self.stdout, self.stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.start, self.end = time.monotonic(), None
        self.process = os.fork()
        if self.process == 0:
            os.setsid()
            os.chdir(folder)
            for number, file in enumerate((open(os.devnull, "rb"), self.stdout, self.stderr)):
                os.dup2(file.fileno(), number)
            if unprivileged:
                obey_permissions()
            os._exit(run(program, argv))

    def ended(self) -> bool:
        """Return whether the command has ended. Kill it after TIME."""
        late = time.monotonic() - self.start > TIME
        if late:
            os.killpg(self.process, signal.SIGKILL)
        process, status, usage = os.wait4(self.process, 0 if late else os.WNOHANG)
        if process:
            code = None if late else os.waitstatus_to_exitcode(status)
            texts = {
                name: self.text(file)
                for name, file in (("stdout", self.stdout), ("stderr", self.stderr))
            }
            self.end = {
                "code": code,
                **texts,
                "seconds": time.monotonic() - self.start,
                "peak": usage.ru_maxrss / 1024,
            }
        return bool(process)

    @staticmethod
    def text(file) -> str:
        """Return the content of a file."""
        file.seek(0)
        return file.read().decode(errors="backslashreplace")


def run_all(commands: list[list]) -> list[dict]:
    """Run commands. Return their outcomes."""
    waiting, running, every = commands[::-1], [], []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append(Command(*waiting.pop()))
            every.append(running[-1])
        running = [command for command in running if not command.ended()]
        time.sleep(0.005)
    return [command.end for command in every]


if __name__ == "__main__":
    for program in PROGRAMS:
        importlib.import_module(program)
    gc.freeze()  # a collection in a child would copy all imported objects
    # A command that allocates too much must fail.
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    for line in sys.stdin:
        print(json.dumps(run_all(json.loads(line))), flush=True)
