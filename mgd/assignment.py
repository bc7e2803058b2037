"""Assign teacher channels to student channels at the least total cost."""

import torch


def assign(cost: torch.Tensor, groups: int | None = None) -> torch.Tensor:
    """Return the matching (G, S) int64 of least total cost for a cost matrix (S, T).

    Column a lists the G teacher channels of student channel a in ascending order. Each teacher
    channel is used at most once. G = T // S, or `groups` if given (sparse matching uses 1). If
    G * S < T, all T channels compete, and some stay unmatched (arXiv 2008.09958, eq. 5). The
    order within a column does not affect the cost. Sorting makes equal solutions equal matrices.

    ValueError: fewer teacher than student channels, too many groups, or a cost that is not finite.
    """
    # Imported here because it uses 34 MB, and only the worker that solves needs it.
    from scipy.optimize import linear_sum_assignment

    S, T = cost.shape
    G = T // S if groups is None else groups
    if not 1 <= G <= T // S:
        raise ValueError(
            f"{T} teacher channels cannot give {max(G, 1)} to each of {S} student channels"
        )
    if not torch.isfinite(cost).all():
        raise ValueError("the cost matrix has values that are not finite")
    # A constant added to a row or column does not change the best solution. Subtracting the
    # minima halves the solver's time.
    cost = cost - cost.amin(1, keepdim=True)
    if G * S == T:  # otherwise columns may stay unmatched, and their constants would matter
        cost = cost - cost.amin(0)
    # (G S, T): row g * S + a is student channel a.
    rows, columns = linear_sum_assignment(cost.repeat(G, 1).cpu().numpy())
    matching = torch.empty(G * S, dtype=torch.int64)
    matching[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return matching.view(G, S).sort(dim=0).values
