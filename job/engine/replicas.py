"""Compare the workers: the tensors that they share must have the same bytes."""

import torch
from torch import nn

from job.cluster import comm
from job.engine.statistics import own_statistics
from job.errors import RunError

BLOCK = 2**18  # values at a time: the products stay in the cache
BASE = 1_000_003  # of the polynomial of the blocks


def shared(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors that are the same on all workers, by name.

    They are a model's parameters and buffers, and the optimizer's momenta. Running statistics
    differ between workers and are left out.
    """
    own = own_statistics(model)
    tensors = {name: value for name, value in model.state_dict().items() if name not in own}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        tensors |= {
            f"{key} of {name}": value for key, value in state.items() if torch.is_tensor(value)
        }
    return tensors


def digest(value: torch.Tensor) -> torch.Tensor:
    """Return a digest of a tensor's bytes, () int64.

    The bytes are read as int32, or as int16 if the tensor has 16-bit values; their number must be a
    multiple of 4 or 2. The digest is the sum of these integers, each times an odd number that
    depends on its index. A change of one integer always changes the digest, because odd numbers
    have an inverse modulo 2**64. Two swapped integers change it too, and so does the same bit
    flipped in two integers. A plain sum would miss these.
    """
    dtype = torch.int16 if value.element_size() == 2 else torch.int32
    integers = value.detach().contiguous().view(-1).view(dtype)
    coefficients = torch.arange(1, 2 * BLOCK, 2, device=integers.device)
    total = torch.zeros((), dtype=torch.int64, device=integers.device)
    for block in integers.split(BLOCK):
        total = total * BASE + (block * coefficients[: len(block)]).sum()
    return total


def check(tensors: dict[str, torch.Tensor], when: str) -> None:
    """Compare tensors between the workers. A collective.

    tensors: by name. when: ends "the workers' networks differ".
    RunError, on all workers: a tensor differs. The error names the first, and the workers that
    differ from most others.
    """
    digests = torch.stack([digest(value) for value in tensors.values()])  # (n,)
    mine = comm.to_host(digests, "agreement")
    highest, lowest = comm.highest(torch.stack([mine, -mine]), "agreement") * torch.tensor(
        [[1], [-1]]
    )
    differ = (highest != lowest).nonzero()[:, 0].tolist()
    if not differ:
        return
    by_rank = comm.gather(mine[differ[:1]], "agreement.found").tolist()  # N digests
    usual = max(by_rank, key=by_rank.count)
    others = ", ".join(str(rank) for rank, number in enumerate(by_rank) if number != usual)
    raise RunError(
        f"the workers' networks differ {when}: {len(differ)} of {len(tensors)} tensors; the first "
        f"is {list(tensors)[differ[0]]}, where worker {others} has other bytes than worker "
        f"{by_rank.index(usual)}. A node's memory or network may be faulty: resume from the last "
        "checkpoint, on other nodes",
        code=1,
    )
