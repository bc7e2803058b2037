"""The cost of letting a student channel imitate a teacher channel."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def channel_cost(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the squared distances of normalised channel maps, summed over the batch.

    student (B, S, H, W) and teacher (B, T, H, W) -> (S, T) float64. Each channel's map of each image
    is flattened and L2-normalised, and C[a, b] = sum over images of |s_a - t_b|^2 (arXiv 2008.09958,
    eq. 4). A map that is zero everywhere stays zero: its distance to a normalised one is 1.

    ValueError: the two differ in images or positions.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in images and positions"
        )
    s = F.normalize(
        student.permute(0, 2, 3, 1).flatten(1, 2).float(), dim=1
    )  # (B, P, S), as channels last lie in memory
    t = F.normalize(teacher.permute(0, 2, 3, 1).flatten(1, 2).float(), dim=1)  # (B, P, T)
    # |s - t|^2 = |s|^2 + |t|^2 - 2 <s, t>; summing over images and positions is one matrix product.
    inner = s.flatten(0, 1).T @ t.flatten(0, 1)  # (S, T)
    norms = s.square().sum((0, 1)).double()[:, None] + t.square().sum((0, 1)).double()[None, :]
    return norms - 2 * inner.double()
