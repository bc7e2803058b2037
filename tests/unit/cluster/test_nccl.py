"""NCCL's log, with lines as NCCL prints them. No GPU is needed."""

import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from job.cluster import device_errors, nccl

BEFORE = "vm:1:1 [0] NCCL INFO "
IB = f"{BEFORE}NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_3:1/RoCE [RO]; OOB ib0:10.0.0.2<0>\n"
SOCKET = f"{BEFORE}NET/Socket : Using [0]eth0:10.0.0.2<0> [1]eth1:fe80::1%eth1<0>\n"
NONE = f"{BEFORE}NET/IB : No device found.\n"


def using(name):
    return f"{BEFORE}Using network {name}\n"


@pytest.fixture
def log(monkeypatch):
    """A function that appends to NCCL's log."""
    file = os.memfd_create("log")
    monkeypatch.setattr(nccl, "_log", file)
    monkeypatch.setattr(nccl, "_connected", 0)
    yield lambda text: os.write(file, text.encode())
    os.close(file)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("", ""),
        (IB + SOCKET, ""),
        (IB + using("IB"), "IB (mlx5_0:1/IB, mlx5_3:1/RoCE)"),
        (NONE + SOCKET + using("Socket"), "Socket (eth0, eth1)"),
        (IB + SOCKET + using("Socket"), "Socket (eth0, eth1)"),
        (IB + using("AWS Libfabric"), "AWS Libfabric"),
        (IB + using("IB") + using("Socket"), "Socket"),
        (IB.replace("IB : U", "IB: U") + using("IB") * 2, "IB (mlx5_0:1/IB, mlx5_3:1/RoCE)"),
    ],
)
def test_network_is_the_last_one(text, network):
    assert nccl.network(text) == network


def test_installed_nccl_has_these_lines():
    """A newer NCCL with other lines needs other patterns."""
    package = importlib.util.find_spec("nvidia.nccl") if torch.version.cuda else None
    if not package:
        pytest.skip("no package of NCCL")
    [folder] = package.submodule_search_locations
    with open(Path(folder, "lib/libnccl.so.2"), "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lines = [b"Using network %s\0", b"NET/IB : Using%s", b"NET/Socket : Using%s\0"]
        lines += [b"NCCL INFO ", b"NCCL WARN "]
        assert [line for line in lines if content.find(line) < 0] == []


FAILED = """
import ctypes, os, sys
import torch
from job.cluster import nccl
nccl.keep_log()
nccl.keep_log()

class Id(ctypes.Structure):
    _fields_ = [("content", ctypes.c_char * 128)]

library, id, communicator = ctypes.CDLL("libnccl.so.2"), Id(), ctypes.c_void_p()
assert library.ncclGetUniqueId(ctypes.byref(id)) == 0
library.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
assert library.ncclCommInitRank(ctypes.byref(communicator), 1, id, 0)
print(nccl.cause(), "|", "NCCL INFO" in nccl.log(), nccl.connected())
print(nccl.variable("NCCL_NET"), os.environ.get("NCCL_NET"))
"""


@pytest.mark.skipif(not torch.version.cuda, reason="a torch without CUDA")
def test_real_nccl_logs_into_memory(tmp_path):
    """It prints no line. A variable of its file has an effect."""
    (tmp_path / "nccl.conf").write_text("NCCL_NET=Socket\n")
    others = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_")}
    environment = others | {"CUDA_VISIBLE_DEVICES": "", "NCCL_SOCKET_IFNAME": "lo"}
    environment |= {"NCCL_CONF_FILE": str(tmp_path / "nccl.conf")}
    command = [sys.executable, "-c", FAILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged, variable = done.stdout.splitlines()
    assert logged.startswith("Cuda failure '") and logged.endswith("' | True ")
    assert variable == "b'Socket' None"
    assert "NCCL" not in done.stderr


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "NCCL_DEBUG_FILE"])
def test_keep_log_keeps_the_user_s_settings(monkeypatch, name):
    monkeypatch.setattr(nccl, "_log", None)
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    monkeypatch.delenv("NCCL_DEBUG_FILE", raising=False)
    monkeypatch.setenv(name, "WARN")
    nccl.keep_log()
    variables = {key for key in os.environ if key.startswith("NCCL_DEBUG")}
    assert (variables, os.environ[name]) == ({name}, "WARN")
    assert nccl.log() == nccl.connected() == nccl.cause() == ""


def test_cause_is_the_first_warning_after_connecting(log):
    log(f"vm:1:1 [0] a.cc:1 NCCL WARN no NUMA – fell back\n{using('IB')}")
    assert nccl.cause() == "no NUMA – fell back"
    assert nccl.connected() == "IB"
    assert nccl.cause() == ""
    log("\n[2026-11-29 22:22:06] vm:1:2 [0] b.cc:9 (f) NCCL WARN timed out on mlx5_0 \n")
    log("vm:1:2 [0] c.cc:9 NCCL WARN call failed\n")
    assert nccl.cause() == "timed out on mlx5_0"
    error = device_errors.describe(RuntimeError("ncclAllReduce failed: remote error"), "here", {})
    line = "NCCL failed at here (ncclAllReduce failed: remote error; its log: timed out on mlx5_0)."
    assert str(error).startswith(line)


# Unused InfiniBand devices.


@pytest.fixture
def sys_folder(tmp_path, monkeypatch):
    """A node's /sys with three InfiniBand devices, two of them active."""
    for name in nccl.CHOICES:
        monkeypatch.delenv(name, raising=False)
    for name, state in (("mlx5_1", "4: ACTIVE"), ("mlx5_0", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        port = tmp_path / f"class/infiniband/{name}/ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    return str(tmp_path)


def test_unused_devices_are_active_ones_under_tcp(sys_folder):
    assert nccl.unused_devices("Socket (eth0)", sys_folder) == ["mlx5_0", "mlx5_1"]
    assert nccl.unused_devices("Socket (eth0)", f"{sys_folder}/class") == []
    for used in ("IB (mlx5_0:1/IB)", "AWS Libfabric", ""):
        assert nccl.unused_devices(used, sys_folder) == []


def test_unused_devices_skip_unreadable_states(sys_folder):
    """After an error of only one worker, the others would wait in a collective."""
    state = Path(sys_folder, "class/infiniband/mlx5_0/ports/1/state")
    state.unlink()
    state.mkdir()
    assert nccl.unused_devices("Socket (eth0)", sys_folder) == ["mlx5_1"]


CHILD = """
import os, sys
name = os.environ["NCCL_DEBUG_FILE"]
file = os.open(sys.argv[1], os.O_RDWR)
os.dup2(file, int(name.rpartition("/")[2]))
open(name, "w").close()
"""


def test_child_does_not_overwrite_its_own_file(monkeypatch, tmp_path):
    monkeypatch.setattr(nccl, "_log", None)
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    nccl.keep_log()
    try:
        (tmp_path / "file").write_text("kept")
        subprocess.run([sys.executable, "-c", CHILD, tmp_path / "file"], check=True)
        assert (tmp_path / "file").read_text() == "kept"
    finally:
        os.close(nccl._log)


@pytest.mark.parametrize(("name", "value"), [("NCCL_IB_DISABLE", "1"), ("NCCL_NET", "Socket")])
def test_unused_devices_accept_a_chosen_tcp(sys_folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert nccl.unused_devices("Socket", sys_folder) == []
