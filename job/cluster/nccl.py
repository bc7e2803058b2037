"""NCCL's own log: the network that it uses between nodes, and its warnings."""

import contextlib
import ctypes
import glob
import os
import re
from pathlib import Path

# Lines of NCCL's log, from 2.19 to 2.30. A plug-in's name can have spaces.
USING = re.compile(r"NCCL INFO Using network (\S.*)")
DEVICES = re.compile(r"NCCL INFO NET/(IB|Socket) ?: Using((?: \[\d+\]\S+)+)")
WARNING = re.compile(r"NCCL WARN (\S.*)")
TCP = "Socket"  # NCCL's name of TCP
LONGEST = 200  # characters of a warning
CHOICES = ("NCCL_NET", "NCCL_IB_DISABLE", "NCCL_IB_HCA")  # variables that can choose TCP on purpose

_log: int | None = None  # file descriptor of the log, in this process's memory
_connected = 0  # bytes of the log when all GPUs were connected


def keep_log() -> None:
    """Let NCCL log into this process's memory, unless the user has set what it logs or where.

    NCCL reads these variables once, in its first call. Logging costs little: NCCL logs while it
    connects, and no single collective.
    """
    global _log
    if _log is None and not {"NCCL_DEBUG", "NCCL_DEBUG_FILE"} & os.environ.keys():
        _log = os.memfd_create("nccl-log")
        os.environ["NCCL_DEBUG"] = "INFO"
        # By process id: in a child that inherits the variable, "self" would be a file of the child.
        os.environ["NCCL_DEBUG_FILE"] = f"/proc/{os.getpid()}/fd/{_log}"


def log(start: int = 0) -> str:
    """Return what NCCL has logged, from byte `start` on; "" if the user has set where it logs."""
    if _log is None:
        return ""
    return os.pread(_log, os.fstat(_log).st_size, start).decode(errors="replace")


def connected() -> str:
    """Return the network of the GPUs' connections, which exist now; "" if it is not in the log."""
    global _connected
    text = log()
    _connected = 0 if _log is None else os.fstat(_log).st_size
    return network(text)


def cause() -> str:
    """Return NCCL's warning of the failure that has just been raised; "" without a log of it.

    It is the first one after the GPUs' connection: the calls that fail because of it add others.
    """
    found = WARNING.search(log(_connected))
    return found[1].strip()[:LONGEST] if found else ""


def network(text: str) -> str:
    """Return the network in a log of NCCL, as in "IB (mlx5_0:1/IB)"; "" if there is none.

    The name is NCCL's or a plug-in's. IB covers InfiniBand and RoCE; Socket is TCP.
    """
    names = USING.findall(text)
    if not names:
        return ""
    name = names[-1].strip()
    found = {kind: re.findall(r"\[\d+\](\S+)", words) for kind, words in DEVICES.findall(text)}
    devices = found.get(name, [])
    if name == TCP:  # interface:address<port>; the address is of no use here
        devices = [device.partition(":")[0] for device in devices]
    return f"{name} ({', '.join(devices)})" if devices else name


def unused_devices(used: str, sys: str = "/sys") -> list[str]:
    """Return this node's active InfiniBand and RoCE devices if NCCL uses TCP in spite of them.

    used: from `network`. sys: the system's folder of this name; containers see it too.
    """
    if used.partition(" ")[0] != TCP or any(map(variable, CHOICES)):
        return []
    found = set()
    for path in glob.glob(f"{sys}/class/infiniband/*/ports/*/state"):
        with contextlib.suppress(
            OSError
        ):  # an error of this worker only would leave the others waiting
            if "ACTIVE" in Path(path).read_text():
                found.add(Path(path).parents[2].name)
    return sorted(found)


def variable(name: str) -> bytes | None:
    """Return an environment variable as NCCL has it, also if nccl.conf sets it.

    NCCL sets the variables of that file without Python, whose os.environ lacks them.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype, getenv.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    return getenv(name.encode())
