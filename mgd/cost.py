"""The cost of matching a student channel to a teacher channel."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def channel_cost(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the squared distances of normalised channel maps, summed over the batch.

    student (B, S, H, W), teacher (B, T, H, W) -> C (S, T) float64. Each map of a channel and image
    is flattened and L2-normalised. C[a, b] = sum over images of |s_a - t_b|^2 (arXiv 2008.09958,
    eq. 4). A zero map stays zero, so its squared distance to a normalised map is 1.

    ValueError: student and teacher differ in the number of images or in map size.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in "
            "images and positions"
        )
    # (B, P, S) and (B, P, T): the memory order of channels last.
    s = F.normalize(student.permute(0, 2, 3, 1).flatten(1, 2).float(), dim=1)  # (B, P, S)
    t = F.normalize(teacher.permute(0, 2, 3, 1).flatten(1, 2).float(), dim=1)  # (B, P, T)
    # |s - t|^2 = |s|^2 + |t|^2 - 2 <s, t>. One matrix product sums over images and positions.
    inner = s.flatten(0, 1).T @ t.flatten(0, 1)  # (S, T)
    norms = s.square().sum((0, 1)).double()[:, None] + t.square().sum((0, 1)).double()[None, :]
    return norms - 2 * inner.double()
