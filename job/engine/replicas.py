"""Whether the workers still agree: what they train together is to have the same bytes on each of them."""

import torch
from torch import nn

from job.cluster import comm
from job.engine.statistics import own_statistics
from job.errors import RunError

PART = 2**18  # words at a time: what is made of them stays in the cache
FACTOR = 1_000_003  # between parts


def shared(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, torch.Tensor]:
    """What is the same on every worker, by name: a model but for running statistics, which are each one's own, and momenta."""
    own = own_statistics(model)
    found = {name: value for name, value in model.state_dict().items() if name not in own}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        found |= {
            f"{kind} of {name}": value for kind, value in state.items() if torch.is_tensor(value)
        }
    return found


def digest(value: torch.Tensor) -> torch.Tensor:
    """Return a number of a tensor's 32-bit words and their places, () int64: their sum, each times an odd number of its place.

    It must be made of whole such words. Numbers of 16 bits are words themselves.

    No change of a single word leaves it, as what is odd has an inverse modulo 2**64; nor do two words that change places, nor
    the same bit of two words, which a plain sum would let pass.
    """
    kind = torch.int16 if value.element_size() == 2 else torch.int32
    words = value.detach().contiguous().view(-1).view(kind)
    weights = torch.arange(1, 2 * PART, 2, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(PART):
        total = total * FACTOR + (part * weights[: len(part)]).sum()
    return total


def check(tensors: dict[str, torch.Tensor], when: str) -> None:
    """Compare what the workers share, by its names. A collective: all workers call it.

    RunError, on all: a tensor differs between workers; the first such is named, and who has what no majority has.
    """
    digests = torch.stack([digest(value) for value in tensors.values()])  # (n,)
    mine = comm.to_host(digests, "agreement")
    highest, lowest = comm.highest(torch.stack([mine, -mine]), "agreement") * torch.tensor(
        [[1], [-1]]
    )
    differ = (highest != lowest).nonzero()[:, 0].tolist()
    if not differ:
        return
    found = comm.gather(mine[differ[:1]], "agreement.found").tolist()  # a number a worker
    usual = max(found, key=found.count)
    others = ", ".join(str(rank) for rank, number in enumerate(found) if number != usual)
    raise RunError(
        f"the workers' networks are not the same {when}: {len(differ)} of {len(tensors)} tensors differ, the first is "
        f"{list(tensors)[differ[0]]}, where worker {others} has other bytes than worker {found.index(usual)}. A node's memory or "
        "network may be at fault: resume from the last checkpoint, on other nodes",
        code=1,
    )
