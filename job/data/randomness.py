"""Counter-based randomness: every random number is a function of the seed and its purpose.

No generator has a state between steps, so checkpoints need none. The numbers of workers and of
loader processes do not change a draw.
"""

from typing import Any

import numpy as np

PURPOSES = ("order", "shuffle", "view", "refresh", "drop", "weights", "pack", "matching")


def counter(
    seed: int, purpose: str, epoch: int = 0, step: int = 0, sample: int = 0
) -> np.random.Philox:
    """Return the Philox counter for these numbers. Its raw output is equal on all machines.

    Each number is from 0 to 2**63 - 1. ValueError: `purpose` is not one of PURPOSES.
    Source: Salmon et al., SC 2011.
    """
    return np.random.Philox(key=[seed, PURPOSES.index(purpose)], counter=[0, sample, step, epoch])


def permutation(n: int, *what: Any, **where: Any) -> np.ndarray:
    """Return a permutation of 0..n-1, int64, for `counter(*what, **where)`."""
    return np.argsort(counter(*what, **where).random_raw(n), kind="stable")


def torch_seed(*what: Any, **where: Any) -> int:
    """Return a seed for a torch generator, for `counter(*what, **where)`."""
    return int(counter(*what, **where).random_raw()) >> 1  # must fit an int64
