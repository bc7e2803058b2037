"""End with one line and exit code 2 if no GPU can be used. `make test-gpu` starts with it."""

import sys

from job.cluster import gpus


def problem() -> str:
    """Return why no GPU can be used here; "" if one can."""
    return gpus.problem(0, 1, has_nccl=True) or ("" if gpus.available() else "torch finds no GPU")


if __name__ == "__main__":
    if text := problem():
        print(f"no GPU tests: {text}. Run them on a machine with an NVIDIA GPU", file=sys.stderr)
        sys.exit(2)
