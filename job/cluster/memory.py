"""Limit this process's memory, free unused memory, and set up glibc's malloc."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGEST = 2**25  # bytes, the highest M_MMAP_THRESHOLD

keeps = False  # whether `keep_freed_memory` has changed malloc's settings


def keep_freed_memory(largest: int = LARGEST) -> None:
    """Keep freed memory in this process instead of returning it to the system.

    Each returned page costs a page fault when the process needs it again. Decoding an image and
    changing its colours need up to four times as long with new pages for each array.

    largest: bytes, at most 2**25. A larger block that does not fit into the kept memory is
    allocated outside of it, and returned when freed. A step at 224 pixels on the CPU allocates and
    frees gigabytes of feature maps. Measured with 2**25: 5.7 s and 2.2 GB for 32 images, 11.4 s and
    3.0 GB for 64. With 2**23: 6.3 s and 1.9 GB, 14.5 s and 2.6 GB. With blocks of any size, 64
    images need 3.6 GB and 11.8 s.
    """
    global keeps
    keeps = True
    set_malloc(largest, 2**31 - 1)


def free_as_usual() -> None:
    """End `keep_freed_memory`.

    malloc's earlier settings cannot be read. Set those that malloc itself chooses after a process
    has freed a block of 2**25 bytes.
    """
    global keeps
    if keeps:
        set_malloc(LARGEST, 2 * LARGEST)
    keeps = False


def set_malloc(mapped: int, kept: int) -> None:
    """Set malloc's limits, in bytes, for blocks without pages of their own and for kept memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, mapped)
        libc.mallopt(M_TRIM_THRESHOLD, kept)


def set_apart() -> None:
    """Exclude all current objects from garbage collections: they stay until the run ends.

    They are 350,000, and cost 0.25 s a collection.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Free unreachable cycles of references, and return the heap's empty pages to the system.

    Networks traced by torch.fx are such cycles and hold copies of all parameters. Each k-NN
    accuracy leaves one. Python collects cycles when there are many objects, not when they are
    large. Without this call, a worker grew from 1.6 to 2.5 GB in two hours with epochs of 14 s.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """Limit this process to `size` bytes more of address space than it has now.

    The limit is for all threads together. Allocated memory counts even if it is never used.
    MemoryError, or torch's RuntimeError: the process needs more.
    """
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + size
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    if before == resource.RLIM_INFINITY or limit < before:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
