"""Whether the workers still agree: what they train together is to have the same bytes on each of them."""

import horovod.torch as hvd
import torch
from torch import nn

from job.errors import RunError
from job.run.statistics import OWN


def shared(model: nn.Module) -> dict[str, torch.Tensor]:
    """What of a model is the same on every worker, by name: all but the running statistics, which are each one's own."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith(OWN)}


def digests(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a number for each tensor, (n,) int64: the sum of its 32-bit words, which no change of a single value leaves."""
    return torch.stack([value.detach().contiguous().view(-1).view(torch.int32).sum(dtype=torch.int64) for value in tensors]).cpu()


def check(model: nn.Module, when: str) -> None:
    """Compare what the workers share. A collective: all workers call it.

    RunError, on all: a tensor differs between workers; the first such is named, and who has what no majority has.
    """
    tensors = shared(model)
    mine = digests(list(tensors.values()))  # (n,)
    highest, lowest = hvd.allreduce(torch.stack([mine, -mine]), op=hvd.Max, name="agreement") * torch.tensor([[1], [-1]])
    differ = (highest != lowest).nonzero()[:, 0].tolist()
    if not differ:
        return
    found = hvd.allgather(mine[differ[:1]], name="agreement.found").tolist()  # a number a worker
    usual = max(found, key=found.count)
    others = ", ".join(str(rank) for rank, number in enumerate(found) if number != usual)
    raise RunError(
        f"the workers' networks are not the same {when}: {len(differ)} of {len(tensors)} tensors differ, the first is "
        f"{list(tensors)[differ[0]]}, where worker {others} has other bytes than worker {found.index(usual)}. A node's memory or "
        "network may be at fault: resume from the last checkpoint, on other nodes",
        code=1,
    )
