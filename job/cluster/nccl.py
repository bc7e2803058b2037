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
TCP = "Socket"  # NCCL's name for TCP
LONGEST = 200  # characters of a reported warning
CHOICES = ("NCCL_NET", "NCCL_IB_DISABLE", "NCCL_IB_HCA")  # variables by which users choose TCP

_log: int | None = None  # file descriptor of the log, in this process's memory
_connected = 0  # bytes of the log when all GPUs were connected


def keep_log() -> None:
    """Make NCCL log into this process's memory, unless the user has set up NCCL's log.

    NCCL reads these variables once, in its first call. Logging costs little: NCCL logs when it
    connects, not for each collective.
    """
    global _log
    if _log is None and not {"NCCL_DEBUG", "NCCL_DEBUG_FILE"} & os.environ.keys():
        _log = os.memfd_create("nccl-log")
        os.environ["NCCL_DEBUG"] = "INFO"
        # Not /proc/self: a child that inherits the variable would open its own file.
        os.environ["NCCL_DEBUG_FILE"] = f"/proc/{os.getpid()}/fd/{_log}"


def log(start: int = 0) -> str:
    """Return NCCL's log from byte `start`; "" if the user has set up the log."""
    if _log is None:
        return ""
    return os.pread(_log, os.fstat(_log).st_size, start).decode(errors="replace")


def connected() -> str:
    """Return the network between the GPUs, just connected; "" if it is not in the log."""
    global _connected
    text = log()
    _connected = 0 if _log is None else os.fstat(_log).st_size
    return network(text)


def cause() -> str:
    """Return NCCL's warning of the error that was just raised; "" if it is not in the log.

    It is the first warning after the GPUs were connected: calls that fail as a consequence add
    others.
    """
    match = WARNING.search(log(_connected))
    return match[1].strip()[:LONGEST] if match else ""


def network(text: str) -> str:
    """Return the network from a log of NCCL, such as "IB (mlx5_0:1/IB)", or "".

    The name is NCCL's or a plug-in's. IB covers InfiniBand and RoCE. Socket is TCP.
    """
    names = USING.findall(text)
    if not names:
        return ""
    name = names[-1].strip()
    used = {net: re.findall(r"\[\d+\](\S+)", listed) for net, listed in DEVICES.findall(text)}
    devices = used.get(name, [])
    if name == TCP:  # interface:address<port>: keep the interface
        devices = [device.partition(":")[0] for device in devices]
    return f"{name} ({', '.join(devices)})" if devices else name


def unused_devices(used: str, sys: str = "/sys") -> list[str]:
    """Return this node's active InfiniBand and RoCE devices if NCCL uses TCP instead of them.

    used: from `network`. sys: the folder /sys, which containers have too.
    """
    if used.partition(" ")[0] != TCP or any(map(variable, CHOICES)):
        return []
    active = set()
    for path in glob.glob(f"{sys}/class/infiniband/*/ports/*/state"):
        # An error of this worker only would leave the others waiting.
        with contextlib.suppress(OSError):
            if "ACTIVE" in Path(path).read_text():
                active.add(Path(path).parents[2].name)
    return sorted(active)


def variable(name: str) -> bytes | None:
    """Return the value of an environment variable for NCCL, even if nccl.conf sets it.

    NCCL sets the variables of that file in C, so Python's os.environ does not have them.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype, getenv.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    return getenv(name.encode())
