"""Feed the readers damaged and hostile input for some seconds: they give what they promise, or one line that says what is wrong.

python tests/campaigns/fuzz/fuzz.py [--seconds 60] [--seed N] [checkpoint] [yaml] [argv]

What leads to anything else (another exception, a hang, a crash, an attempt to run code) is left in --out, and the exit
code is 1. Inputs are mutations of a target's seeds, and of those mutations that made a reader say something new.
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
MEMORY = 4 * 2**30  # bytes that a reader may take beyond what torch has mapped by then
# What no reader has a reason to do, of Python's audit events. pickle.find_class is that of the pickle that runs code.
FORBIDDEN = re.compile(
    r"os\.(system|exec|fork|posix_spawn|mkdir|remove|rename|rmdir)|subprocess|socket|pickle|shutil|exec$"
)


class Watch:
    """Notes what a reader does that it must not do, while it reads from files in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.on = str(folder), [], False
        sys.addaudithook(self.note)

    def note(self, event, arguments):
        what = arguments[0] if arguments else None
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if (
            self.on
            and ((writes and not str(what).startswith(self.folder)) or FORBIDDEN.match(event))
            and not imports()
        ):
            self.seen.append(f"{event}({what!r:.80})")


def imports() -> bool:
    """Whether what happens is a module's first import, which torch leaves to when it is needed."""
    return any(
        frame.f_code.co_filename.startswith("<frozen importlib")
        for frame, _ in traceback.walk_stack(None)
    )


def outcome(target, path: Path, watch: Watch) -> tuple[str, str]:
    """Return what kind of end reading the file comes to, and in words what is wrong with it, if something is."""
    signal.alarm(HANG)
    watch.seen, watch.on = [], True
    try:
        kind, wrong = target.check(path), ""
    except RunError as error:
        kind, wrong = (
            f"one line from {place(error)}, for {place(error.__context__)}",
            "two lines" if "\n" in str(error) else "",
        )
    except Exception as error:
        kind = wrong = f"{type(error).__name__} at {place(error)}"
        wrong += f": {error}"
    watch.on = False
    signal.alarm(0)
    return (watch.seen[0].split("(")[0], f"did {watch.seen[0]}") if watch.seen else (kind, wrong)


def place(error: BaseException | None) -> str:
    """Where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "nothing"


def hunt(name: str, seconds: float, seed: int, path: Path, out: Path) -> None:
    """Try mutations for so many seconds; exit with 1 if some end otherwise than they should."""
    target, watch, draw = TARGETS[name], Watch(path.parent), random.Random(seed)
    corpus, kinds, found, tried = target.seeds(), set(), 0, 0
    for data in corpus:  # also so that what torch imports late is there before the limit
        path.write_bytes(data)
        outcome(target, path, watch)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = target.mutate(draw, draw.choice(corpus), draw.choice(corpus))
        path.write_bytes(data)
        kind, wrong = outcome(target, path, watch)
        tried += 1
        if kind not in kinds:
            kinds.add(kind)
            corpus.append(data)
            if wrong:
                found += 1
                print(f"{name}: {wrong:.200}: {keep(data, name, out)}", flush=True)
    print(
        f"{name}: {tried} inputs, {len(kinds)} kinds of outcome, {found} of them wrong (--seed {seed})",
        flush=True,
    )
    sys.exit(found > 0)


def keep(data: bytes, name: str, out: Path) -> Path:
    """Leave an input in the folder `out`; return its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)} (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="for all targets together (default: 60)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=time.time_ns() % 10**9,
        help="of the mutations (default: the time)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/fuzz"),
        help="folder of what was found (default: runs/fuzz)",
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
                how = (
                    f"longer than {HANG} s"
                    if child.exitcode == -signal.SIGALRM
                    else signal.Signals(-child.exitcode).name
                )
                print(
                    f"{name}: {how}: {keep(path.read_bytes(), name, given.out)} (--seed {given.seed})"
                )
        failed |= child.exitcode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
