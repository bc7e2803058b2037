"""Counter-based randomness: every random number is a function of the seed and of what it is for.

No generator runs on from step to step, so none has to be saved, and neither the number of workers nor that
of loader processes changes a draw.
"""

from typing import Any

import numpy as np

PURPOSES = ("order", "shuffle", "view", "refresh", "drop", "weights", "pack", "matching")


def counter(
    seed: int, purpose: str, epoch: int = 0, step: int = 0, sample: int = 0
) -> np.random.Philox:
    """Return the Philox counter (Salmon et al., SC 2011) for these numbers; its raw output is the same on every machine.

    Each is from 0 to 2**63 - 1, and `purpose` one of PURPOSES. ValueError: it is none.
    """
    return np.random.Philox(key=[seed, PURPOSES.index(purpose)], counter=[0, sample, step, epoch])


def permutation(n: int, *what: Any, **where: Any) -> np.ndarray:
    """Return a permutation of 0..n-1, int64, for `counter(*what, **where)`."""
    return np.argsort(counter(*what, **where).random_raw(n), kind="stable")


def torch_seed(*what: Any, **where: Any) -> int:
    """Return a seed for a torch generator, for `counter(*what, **where)`."""
    return int(counter(*what, **where).random_raw()) >> 1  # torch wants it to fit an int64
