"""Limit this process's memory, free unused memory, and set up glibc's malloc."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from malloc.h
LARGEST = 2**25  # bytes, the highest threshold that malloc itself chooses
BLOCKS = 2**16  # malloc's own number of blocks at most with pages of their own

keeps = False  # whether `keep_freed_memory` has changed malloc's settings


def keep_freed_memory(largest: int | None = None) -> None:
    """Keep freed memory in this process instead of returning it to the system.

    Each returned page costs a page fault when the process needs it again. Decoding an image and
    changing its colours need up to four times as long with new pages for each array.

    largest: bytes. A larger block that does not fit into the kept memory is allocated outside of
    it, and returned when freed. Without `largest`, no block is. Measured: a step at 224 pixels on
    the CPU allocates and frees gigabytes of feature maps. With 32 images it needs 5.8 s and 2.2 GB
    without `largest`, and 6.3 s and 1.9 GB with 2**23. With 16 images the times are 2.9 and 3.0 s.
    """
    global keeps
    keeps = True
    set_malloc(largest or LARGEST, 2**31 - 1, BLOCKS if largest else 0)


def free_as_usual() -> None:
    """End `keep_freed_memory`.

    malloc's earlier settings cannot be read. Set those that malloc itself chooses after a process
    has freed a block of LARGEST bytes.
    """
    global keeps
    if keeps:
        set_malloc(LARGEST, 2 * LARGEST, BLOCKS)
    keeps = False


def set_malloc(threshold: int, kept: int, blocks: int) -> None:
    """Set up malloc.

    At most `blocks` blocks above `threshold` bytes have pages of their own, and at most `kept`
    bytes of freed memory are kept.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, threshold)
        libc.mallopt(M_TRIM_THRESHOLD, kept)
        libc.mallopt(M_MMAP_MAX, blocks)


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
