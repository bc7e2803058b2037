"""Memory limits, and freed memory that is kept or given back, in separate processes."""

import ctypes
import resource
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(ctypes.CDLL(None), "mallopt"), reason="the system's malloc is not glibc's"
    ),
]

PAGE = resource.getpagesize()
FAULTS = """
import ctypes, resource
from job.cluster.memory import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is one page
{call}
faults = []
for _ in range(12):
    blocks = [b"x" * {size} for _ in range(4)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[1]) / 10)
"""


def run(script: str) -> str:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pages_faulted(call: str, size: int) -> float:
    """Return the fraction of pages with a fault if four blocks are allocated repeatedly.

    size: bytes of a block.
    """
    return float(run(FAULTS.format(call=call, size=size))) / (4 * size / PAGE)


@pytest.mark.parametrize(
    ("call", "size", "kept"),
    [
        ("", 2**25, False),
        ("keep_freed_memory()", 3 * 2**20, True),
        ("keep_freed_memory()", 2**24, True),
        ("keep_freed_memory()", 2**26, False),
        ("keep_freed_memory(2**24)", 3 * 2**20, True),
        ("keep_freed_memory(2**24)", 2**25, False),
    ],
)
def test_freed_memory_is_kept_up_to_the_largest_size(call, size, kept):
    fraction = pages_faulted(call, size)
    assert fraction < 0.01 if kept else fraction > 0.9


def test_give_back_returns_kept_memory():
    """The memory is below small objects that stay, so the end of the heap cannot fall."""
    script = """
import psutil
from job.cluster.memory import give_back, keep_freed_memory
keep_freed_memory()
blocks = [b"x" * 2**20 for _ in range(200)]
pins = [object() for _ in range(10000)]
del blocks
before = psutil.Process().memory_info().rss
give_back()
print(before - psutil.Process().memory_info().rss)
"""
    assert int(run(script)) > 180 * 2**20


def test_give_back_frees_cycles_but_no_frozen_object():
    """The cycle is a network traced by torch.fx. Python itself collects no garbage."""
    script = """
import gc, weakref
from job.cluster.memory import give_back, set_apart
from job.networks import build_resnet, with_features
gc.disable()
set_apart()
kept = gc.get_freeze_count()
net = build_resnet("resnet18")
weight = weakref.ref(net.conv1.weight)
traced = with_features(net, [], output="flatten")
del net, traced
held = weight() is not None
give_back()
print(held, weight() is None, kept > 10000, len(gc.get_objects()) < kept / 10)
"""
    assert run(script).split() == ["True"] * 4


def test_at_most_limits_memory():
    script = """
import resource, torch
from job.cluster.memory import at_most
before = resource.getrlimit(resource.RLIMIT_AS)
for allocate in (lambda: bytearray(2**29), lambda: torch.empty(2**29, dtype=torch.uint8)):
    try:
        with at_most(2**28):
            allocate()
        print("allocated")
    except (MemoryError, RuntimeError):
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with at_most(2**30), at_most(2**32):
        allocate()
        assert resource.getrlimit(resource.RLIMIT_AS)[0] < 2**36
"""
    assert run(script) == ""
