"""Reducers: from T teacher channels to the S that the student is to imitate (arXiv 2008.09958, section 3.3).

Each takes the teacher's maps (B, T, H, W), the margins (T,) and a matching (G, S), and returns maps
(B, S, H, W) and margins (S,). `generator` matters to random drop alone.
"""

import torch


def select(teacher: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Return the maps of `channels` (S,) of a teacher's (B, T, H, W), channels last.

    The same as teacher[:, channels], which takes twice as long where the teacher is channels last.
    """
    B, T, H, W = teacher.shape
    rows = teacher.permute(0, 2, 3, 1).reshape(-1, T)  # (BHW, T)
    return rows.index_select(1, channels).view(B, H, W, -1).permute(0, 3, 1, 2)


def absolute_max_pooling(teacher, margin, matching, generator=None):
    """At each position the matched response of largest magnitude (+a of +a and -a); the mean of the matched margins."""
    highest = lowest = select(teacher, matching[0])  # (B, S, H, W)
    for channels in matching[1:]:
        other = select(teacher, channels)
        highest, lowest = torch.maximum(highest, other), torch.minimum(lowest, other)
    # The magnitude is the larger of the two, and their sum has its sign: no masks, which cost more than the rest.
    return torch.copysign(torch.maximum(highest, -lowest), highest + lowest), margin[matching].mean(0)


def random_drop(teacher, margin, matching, generator=None):
    """At each position one of the matched responses at random; one of the matched margins at random."""
    G, S = matching.shape
    B, _, H, W = teacher.shape
    device = teacher.device
    chosen = torch.randint(G, (1, S), generator=generator, device=device)
    picks = torch.randint(G, (B, S, H, W), generator=generator, device=device, dtype=torch.int32)
    reduced = select(teacher, matching[0])
    for g in range(1, G):
        reduced = torch.where(picks == g, select(teacher, matching[g]), reduced)
    return reduced, margin[matching].gather(0, chosen)[0]


def simple_pooling(teacher, margin, matching, generator=None):
    """At each position the largest of the matched responses; the largest of the matched margins."""
    reduced = select(teacher, matching[0])
    for channels in matching[1:]:
        reduced = torch.maximum(reduced, select(teacher, channels))
    return reduced, margin[matching].amax(0)


def sparse_matching(teacher, margin, matching, generator=None):
    """The one teacher channel that each student channel is matched to: a matching of shape (1, S)."""
    if matching.shape[0] != 1:
        raise ValueError(f"sparse matching takes one teacher channel for each student channel, not {matching.shape[0]}")
    return select(teacher, matching[0]), margin[matching[0]]


REDUCERS = {"amp": absolute_max_pooling, "rd": random_drop, "sp": simple_pooling, "sm": sparse_matching}
