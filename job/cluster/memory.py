"""How much memory this process may take, when it frees what nothing needs any more, and what glibc's malloc does with that."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 2**25  # bytes, the highest M_MMAP_THRESHOLD

keeps = False  # whether `keep_freed_memory` has changed malloc's settings


def keep_freed_memory(largest: int = 2**23) -> None:
    """Let this process keep what it frees instead of giving it back to the system: each page costs a fault when it returns.

    largest: bytes, at most 2**25; what is larger and fits nowhere in what is kept does not make that grow, and goes back.
    Measured: a step at 224 pixels on the CPU frees and takes gigabytes of feature maps, which costs 0.6 of its 4.5 seconds.
    With 2**25 for `largest` a worker needs 1,750 MB in place of 1,670, and as much time; with 2**22, 6 % more time. Decoding an
    image and changing its colours takes up to four times as long with arrays that come and go.
    """
    global keeps
    keeps = True
    set_malloc(largest, 2**31 - 1)


def free_as_usual() -> None:
    """End `keep_freed_memory`.

    The settings of before cannot be read. malloc gets those that it gives itself in a process that
    has freed a block of 2**25 bytes.
    """
    global keeps
    if keeps:
        set_malloc(LARGEST, 2 * LARGEST)
    keeps = False


def set_malloc(mapped: int, kept: int) -> None:
    """Set the sizes in bytes of blocks that have pages of their own, and of kept free memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, mapped)
        libc.mallopt(M_TRIM_THRESHOLD, kept)


def set_apart() -> None:
    """Let garbage collections pass over all that there is now, which stays to the run's end: 350,000 objects, 0.25 s a time."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Free what only cycles of references hold, and give the pages that nothing is on back to the system, of the whole heap.

    Networks traced by torch.fx are such cycles, and whole copies of parameters hang on them: each k-NN accuracy leaves one.
    Python looks for cycles when there are many objects, not when they are large: in two hours of epochs of 14 s a worker
    that waited for it grew from 1.6 to 2.5 GB.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let this process take no more than `size` bytes beyond those that it has.

    Of the address space, all threads together: what is asked for counts, before a byte of it is touched.
    MemoryError, or torch's RuntimeError: it asks for more.
    """
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + size
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    if before == resource.RLIM_INFINITY or limit < before:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
