"""The queue of negative keys: a ring that takes any number of them at a time."""

import torch


@torch.no_grad()
def enqueue(queue: torch.Tensor, pointer: torch.Tensor, keys: torch.Tensor) -> None:
    """Write keys (n, dim) into queue (dim, K) from pointer (1,) on, over the oldest, in place.

    The ring wraps; of more than K keys the last K stay, as if they had come one by one (arXiv 1911.05722, section 3.2).
    """
    K, n = queue.shape[1], keys.shape[0]
    places = (pointer + torch.arange(n, device=queue.device)) % K  # (n,)
    queue[:, places[-K:]] = keys[-K:].T.to(queue.dtype)
    pointer.add_(n).remainder_(K)
