"""Reducers: from T teacher channels to the S that the student is to imitate (arXiv 2008.09958, section 3.3).

Each takes the teacher's maps (B, T, H, W), the margins (T,) and a matching (G, S), and returns maps
(B, S, H, W) and margins (S,). `generator` matters to random drop alone.
"""

from collections.abc import Callable

import torch

from mgd.blocks import blocks

Reduced = tuple[torch.Tensor, torch.Tensor]  # maps (B, S, H, W) and margins (S,)


def reduced(
    teacher: torch.Tensor, matching: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return maps (B, S, H, W), channels last, of what `reduce` makes of matched responses (N, G, S) at N positions: (N, S)."""
    (B, T, H, W), (G, S) = teacher.shape, matching.shape
    maps = teacher.new_empty(B, H, W, S).permute(0, 3, 1, 2)
    for block, place in blocks(teacher, maps):
        rows = block.permute(0, 2, 3, 1).reshape(-1, T)  # (N, T)
        # One selection of rows' entries: teacher[:, channels] takes seven times as long where channels are last.
        responses = rows.index_select(1, matching.flatten()).view(-1, G, S)
        place.permute(0, 2, 3, 1).view(-1, S).copy_(reduce(responses))
    return maps


def absolute_max_pooling(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """At each position the matched response of largest magnitude (+a of +a and -a); the mean of the matched margins."""

    def largest(responses: torch.Tensor) -> torch.Tensor:
        highest, lowest = responses.amax(1), responses.amin(1)
        # The magnitude is the larger of the two, and their sum has its sign: no masks, which cost more than the rest.
        sign = highest + lowest
        return torch.maximum(highest, lowest.neg_()).copysign_(sign)

    return reduced(teacher, matching, largest), margin[matching].mean(0)


def random_drop(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """At each position one of the matched responses at random; one of the matched margins at random."""
    (G, S), device = matching.shape, teacher.device
    chosen = torch.randint(G, (1, S), generator=generator, device=device)

    def pick(responses: torch.Tensor) -> torch.Tensor:
        picks = torch.randint(G, (len(responses), 1, S), generator=generator, device=device)
        return responses.gather(1, picks).squeeze(1)

    return reduced(teacher, matching, pick), margin[matching].gather(0, chosen)[0]


def simple_pooling(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """At each position the largest of the matched responses; the largest of the matched margins."""
    return reduced(teacher, matching, lambda responses: responses.amax(1)), margin[matching].amax(0)


def sparse_matching(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """The one teacher channel that each student channel is matched to. ValueError: the matching is not of shape (1, S)."""
    if matching.shape[0] != 1:
        raise ValueError(
            f"sparse matching takes one teacher channel for each student channel, not {matching.shape[0]}"
        )
    return reduced(teacher, matching, lambda responses: responses.squeeze(1)), margin[matching[0]]


REDUCERS = {
    "amp": absolute_max_pooling,
    "rd": random_drop,
    "sp": simple_pooling,
    "sm": sparse_matching,
}
