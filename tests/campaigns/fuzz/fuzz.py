"""Read damaged and hostile input for some time. Each must give a valid result or one error.

    python tests/campaigns/fuzz/fuzz.py [--seconds 60] [--seed N] [checkpoint] [yaml] [argv]

Inputs that lead to another exception, a hang, a crash or an attempt to run code are saved in --out,
and the exit code is 1. Inputs are mutations of a target's seeds and of earlier mutations that had a
new outcome.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import checkpoints
import configs

from job.errors import RunError

TARGETS = {"checkpoint": checkpoints, "yaml": configs.Yaml, "argv": configs.Argv}
HANG = 10  # s for one input
MEMORY = 4 * 2**30  # bytes that a reader may map in addition to torch
# Python's audit events that no reader needs. pickle.find_class is of the pickle that runs code.
CALLS = "system|exec|fork|posix_spawn|mkdir|remove|rename|rmdir"
FORBIDDEN = re.compile(rf"os\.({CALLS})|subprocess|socket|pickle|shutil|exec$")


class Watch:
    """Records forbidden actions of a reader that reads files in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.on = str(folder), [], False
        sys.addaudithook(self.note)

    def note(self, event, arguments):
        first = arguments[0] if arguments else None
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        writes_elsewhere = writes and not str(first).startswith(self.folder)
        if self.on and (writes_elsewhere or FORBIDDEN.match(event)) and not in_import():
            self.seen.append(f"{event}({first!r:.80})")


def in_import() -> bool:
    """Return whether a module is being imported. torch imports some only when it needs them."""
    return any(
        frame.f_code.co_filename.startswith("<frozen importlib")
        for frame, _ in traceback.walk_stack(None)
    )


def outcome(target, path: Path, watch: Watch) -> tuple[str, str]:
    """Read the file. Return its kind of outcome, and the failure, "" if the outcome is correct."""
    signal.alarm(HANG)
    watch.seen, watch.on = [], True
    try:
        kind, failure = target.check(path), ""
    except RunError as error:
        kind = f"one line from {location(error)}, for {location(error.__context__)}"
        failure = "two lines" if "\n" in str(error) else ""
    except Exception as error:
        kind = failure = f"{type(error).__name__} at {location(error)}"
        failure += f": {error}"
    watch.on = False
    signal.alarm(0)
    return (watch.seen[0].split("(")[0], f"did {watch.seen[0]}") if watch.seen else (kind, failure)


def location(error: BaseException | None) -> str:
    """Return the file and line that raised an error."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "nothing"


def hunt(name: str, seconds: float, seed: int, path: Path, out: Path) -> None:
    """Try mutations for `seconds`. Exit with 1 if an outcome is a failure."""
    target, watch, draw = TARGETS[name], Watch(path.parent), random.Random(seed)
    corpus, kinds, failures, tried = target.seeds(), set(), 0, 0
    for data in corpus:  # torch's late imports must happen before the memory limit
        path.write_bytes(data)
        outcome(target, path, watch)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = target.mutate(draw, draw.choice(corpus), draw.choice(corpus))
        path.write_bytes(data)
        kind, failure = outcome(target, path, watch)
        tried += 1
        if kind not in kinds:
            kinds.add(kind)
            corpus.append(data)
            if failure:
                failures += 1
                print(f"{name}: {failure:.200}: {keep(data, name, out)}", flush=True)
    outcomes = f"{len(kinds)} kinds of outcome, {failures} of them failures"
    print(f"{name}: {tried} inputs, {outcomes} (--seed {seed})", flush=True)
    sys.exit(failures > 0)


def keep(data: bytes, name: str, out: Path) -> Path:
    """Save an input in the folder `out`. Return its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="for all targets together (default: 60)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=time.time_ns() % 10**9,
        help="seed of the mutations (default: the time)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/fuzz"),
        help="folder for inputs that fail (default: runs/fuzz)",
    )
    given = parser.parse_args()
    names = given.targets or list(TARGETS)
    failed = False
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "input"
            arguments = (name, given.seconds / len(names), given.seed, path, given.out)
            child = multiprocessing.get_context("fork").Process(target=hunt, args=arguments)
            child.start()
            child.join()
            if child.exitcode < 0:
                hangs = child.exitcode == -signal.SIGALRM
                failure = f"longer than {HANG} s" if hangs else signal.Signals(-child.exitcode).name
                saved = keep(path.read_bytes(), name, given.out)
                print(f"{name}: {failure}: {saved} (--seed {given.seed})")
        failed |= child.exitcode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
