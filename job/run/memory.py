"""When what nothing needs any more is freed, and what glibc's malloc does with it, where that costs time or memory."""

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory(largest: int = 2**23) -> None:
    """Let this process keep what it frees instead of giving it back to the system: each page costs a fault when it returns.

    largest: bytes, at most 2**25; what is larger and fits nowhere in what is kept does not make that grow, and goes back.
    Measured: a step at 224 pixels on the CPU frees and takes gigabytes of feature maps, which costs 0.6 of its 4.5 seconds.
    With 2**25 for `largest` a worker needs 1,750 MB in place of 1,670, and as much time; with 2**22, 6 % more time. Decoding an
    image and changing its colours takes up to four times as long with arrays that come and go.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, largest)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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
