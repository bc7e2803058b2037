"""The distance that pulls a student's maps towards the reduced teacher's."""

import torch


def partial_l2(student: torch.Tensor, target: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return the partial squared distance, summed: (B, S, H, W), (B, S, H, W), (S,) -> scalar.

    With t' = max(target, margin), positions count where student > t' or t' > 0: a student below a
    negative target is already as silent as it should be (arXiv 1904.01866, eq. 4).
    """
    target = torch.maximum(target.float(), margin.float().view(1, -1, 1, 1))
    difference = student.float() - target
    counted = torch.where((difference > 0) | (target > 0), difference, 0.0)
    return counted.square().sum()
