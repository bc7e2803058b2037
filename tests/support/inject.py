"""Faults at chosen system calls of a program, injected by a preloaded library (inject.c)."""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = tempfile.TemporaryDirectory(prefix="inject-")


@functools.cache
def library() -> str:
    """Compile inject.c and return the library's path."""
    path = Path(FOLDER.name) / "inject.so"
    source = Path(__file__).with_name("inject.c")
    subprocess.run(
        [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl"],
        check=True,
    )
    return str(path)


def injected(*rules: str, trace: str | os.PathLike[str] = os.devnull) -> dict[str, str]:
    """Return variables that apply `rules` to a program and all its child processes.

    rules: as inject.c defines them. trace: the file to which rules of action 0 add lines.
    """
    return {"LD_PRELOAD": library(), "FAULTS": "\n".join(rules), "TRACE": str(trace)}
