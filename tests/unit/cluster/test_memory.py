"""What is taken has an end; what is freed and kept costs no page faults, and what is given back is. In processes of their own."""

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
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is one page wherever this runs
{call}
faults = []
for _ in range(12):
    taken = [b"x" * {size} for _ in range(4)]
    del taken
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[1]) / 10)
"""


def pages_faulted(call: str, size: int) -> float:
    """The share of the pages that faults, when four blocks of `size` bytes are taken and freed again and again."""
    script = FAULTS.format(call=call, size=size)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return float(done.stdout) / (4 * size / PAGE)


@pytest.mark.parametrize(
    ("call", "size", "kept"),
    [
        ("", 2**25, False),
        ("keep_freed_memory()", 3 * 2**20, True),
        ("keep_freed_memory()", 2**26, False),
        ("keep_freed_memory(2**24)", 3 * 2**20, True),
        ("keep_freed_memory(2**24)", 2**25, False),
    ],
)
def test_freed_memory_is_kept_up_to_the_largest_size(call, size, kept):
    share = pages_faulted(call, size)
    assert share < 0.01 if kept else share > 0.9


def test_what_is_kept_can_be_given_back():
    """Below small objects that stay, where the heap's end could not fall."""
    script = """
import psutil
from job.cluster.memory import give_back, keep_freed_memory
keep_freed_memory()
taken = [b"x" * 2**20 for _ in range(200)]
pins = [object() for _ in range(10000)]
del taken
before = psutil.Process().memory_info().rss
give_back()
print(before - psutil.Process().memory_info().rss)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 180 * 2**20


def test_what_only_cycles_hold_is_freed_and_what_was_set_apart_not_looked_at():
    """A network traced by torch.fx, while Python sees no reason to collect garbage."""
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
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["True"] * 4, done.stdout


def test_what_asks_for_more_than_is_allowed_gets_none():
    script = """
import resource, torch
from job.cluster.memory import at_most
before = resource.getrlimit(resource.RLIMIT_AS)
for take in (lambda: bytearray(2**29), lambda: torch.empty(2**29, dtype=torch.uint8)):
    try:
        with at_most(2**28):
            take()
        print("taken")
    except (MemoryError, RuntimeError):
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with at_most(2**30), at_most(2**32):
        take()
        assert resource.getrlimit(resource.RLIMIT_AS)[0] < 2**36
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
