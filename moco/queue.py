"""The queue of negative keys: a ring buffer that accepts any number of keys."""

import torch


@torch.no_grad()
def enqueue(queue: torch.Tensor, pointer: torch.Tensor, keys: torch.Tensor) -> None:
    """Write keys (n, dim) into queue (dim, K) in place, over the oldest keys.

    Writing starts at pointer (1,), which advances by n modulo K. If n > K, the last K keys stay, as
    if they were enqueued one by one (arXiv 1911.05722, section 3.2).
    """
    K, n = queue.shape[1], keys.shape[0]
    columns = (pointer + torch.arange(n, device=queue.device)) % K  # (n,)
    queue[:, columns[-K:]] = keys[-K:].T.to(queue.dtype)
    pointer.add_(n).remainder_(K)
