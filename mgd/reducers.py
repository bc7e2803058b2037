"""Reducers: from T teacher channels to the S that the student is to imitate (arXiv 2008.09958, section 3.3).

Each takes the teacher's maps (B, T, H, W), the margins (T,) and a matching (G, S), and returns maps
(B, S, H, W) and margins (S,). `generator` matters to random drop alone.
"""

import torch

Reduced = tuple[torch.Tensor, torch.Tensor]  # maps (B, S, H, W) and margins (S,)


def matched(teacher: torch.Tensor, matching: torch.Tensor) -> torch.Tensor:
    """Return what each student channel is matched to, (B, H, W, G, S), of a teacher's (B, T, H, W), channels last.

    All in one selection of rows' entries: teacher[:, channels] takes seven times as long where channels are last.
    """
    B, T, H, W = teacher.shape
    rows = teacher.permute(0, 2, 3, 1).reshape(-1, T)  # (BHW, T)
    return rows.index_select(1, matching.flatten()).view(B, H, W, *matching.shape)


def maps(reduced: torch.Tensor) -> torch.Tensor:
    """(B, H, W, S) as maps (B, S, H, W), channels last."""
    return reduced.permute(0, 3, 1, 2)


def absolute_max_pooling(
    teacher: torch.Tensor, margin: torch.Tensor, matching: torch.Tensor, generator: torch.Generator | None = None
) -> Reduced:
    """At each position the matched response of largest magnitude (+a of +a and -a); the mean of the matched margins."""
    responses = matched(teacher, matching)
    highest, lowest = responses.amax(3), responses.amin(3)
    # The magnitude is the larger of the two, and their sum has its sign: no masks, which cost more than the rest.
    sign = highest + lowest
    return maps(torch.maximum(highest, lowest.neg_()).copysign_(sign)), margin[matching].mean(0)


def random_drop(
    teacher: torch.Tensor, margin: torch.Tensor, matching: torch.Tensor, generator: torch.Generator | None = None
) -> Reduced:
    """At each position one of the matched responses at random; one of the matched margins at random."""
    (G, S), (B, _, H, W), device = matching.shape, teacher.shape, teacher.device
    chosen = torch.randint(G, (1, S), generator=generator, device=device)
    picks = torch.randint(G, (B, H, W, 1, S), generator=generator, device=device)
    return maps(matched(teacher, matching).gather(3, picks).squeeze(3)), margin[matching].gather(0, chosen)[0]


def simple_pooling(
    teacher: torch.Tensor, margin: torch.Tensor, matching: torch.Tensor, generator: torch.Generator | None = None
) -> Reduced:
    """At each position the largest of the matched responses; the largest of the matched margins."""
    return maps(matched(teacher, matching).amax(3)), margin[matching].amax(0)


def sparse_matching(
    teacher: torch.Tensor, margin: torch.Tensor, matching: torch.Tensor, generator: torch.Generator | None = None
) -> Reduced:
    """The one teacher channel that each student channel is matched to. ValueError: the matching is not of shape (1, S)."""
    if matching.shape[0] != 1:
        raise ValueError(f"sparse matching takes one teacher channel for each student channel, not {matching.shape[0]}")
    return maps(matched(teacher, matching).squeeze(3)), margin[matching[0]]


REDUCERS = {"amp": absolute_max_pooling, "rd": random_drop, "sp": simple_pooling, "sm": sparse_matching}
