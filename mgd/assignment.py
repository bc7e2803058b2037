"""Which teacher channels each student channel imitates: the cheapest assignment."""

import torch


def assign(cost: torch.Tensor, groups: int | None = None) -> torch.Tensor:
    """Return the matching (G, S) int64 of least total cost for a cost matrix (S, T).

    Column a lists, in ascending order, the G teacher channels of student channel a; no teacher channel
    is taken twice. G = T // S unless `groups` says less (sparse matching takes 1). Where G * S < T all T
    channels compete for the places (arXiv 2008.09958, eq. 5). The ascending order makes equal solutions
    equal matrices: exchanging the channels of one column costs nothing.

    ValueError: fewer teacher than student channels, more groups than fit, or a cost that is not finite.
    """
    from scipy.optimize import (
        linear_sum_assignment,
    )  # 34 MB, which only the worker that solves needs

    S, T = cost.shape
    G = T // S if groups is None else groups
    if not 1 <= G <= T // S:
        raise ValueError(
            f"{T} teacher channels cannot give {max(G, 1)} to each of {S} student channels"
        )
    if not torch.isfinite(cost).all():
        raise ValueError("the cost matrix has values that are not finite")
    # What a whole row or column has in common changes no order of solutions; without it the solver takes half the time.
    cost = cost - cost.amin(1, keepdim=True)
    if G * S == T:  # else a column may stay free, and what it saves counts
        cost = cost - cost.amin(0)
    rows, columns = linear_sum_assignment(
        cost.repeat(G, 1).cpu().numpy()
    )  # row g * S + a is student channel a
    matching = torch.empty(G * S, dtype=torch.int64)
    matching[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return matching.view(G, S).sort(dim=0).values
