"""Reducers: reduce T teacher channels to S target channels (arXiv 2008.09958, section 3.3).

Arguments: the teacher's maps (B, T, H, W), the margins (T,) and a matching (G, S). Results: maps
(B, S, H, W) and margins (S,). Only `random_drop` uses `generator`.
"""

from collections.abc import Callable

import torch

from mgd.blocks import blocks

Reduced = tuple[torch.Tensor, torch.Tensor]  # maps (B, S, H, W) and margins (S,)


def reduced(
    teacher: torch.Tensor, matching: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the matched responses of `teacher` after `reduce`, (B, S, H, W), channels last.

    reduce: responses (R, G, S) at the positions of a block's images -> (R, S).
    """
    (B, T, H, W), (G, S) = teacher.shape, matching.shape
    maps = teacher.new_empty(B, H, W, S).permute(0, 3, 1, 2)
    for block, target in blocks(teacher, maps):
        rows = block.permute(0, 2, 3, 1).reshape(-1, T)  # (R, T)
        # One index_select: teacher[:, channels] is seven times slower if channels are last.
        responses = rows.index_select(1, matching.flatten()).view(-1, G, S)
        target.permute(0, 2, 3, 1).view(-1, S).copy_(reduce(responses))
    return maps


def absolute_max_pooling(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """Keep each position's matched response of largest magnitude, and average matched margins.

    Of +a and -a it keeps +a.
    """

    def largest(responses: torch.Tensor) -> torch.Tensor:
        highest, lowest = responses.amax(1), responses.amin(1)
        # The larger of highest and -lowest is the magnitude. The sign of their sum is its sign.
        # Masks would cost more than all other steps.
        sign = highest + lowest
        return torch.maximum(highest, lowest.neg_()).copysign_(sign)

    return reduced(teacher, matching, largest), margin[matching].mean(0)


def random_drop(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """Keep a random matched response at each position, and a random matched margin."""
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
    """Keep the largest matched response at each position, and the largest matched margin."""
    return reduced(teacher, matching, lambda responses: responses.amax(1)), margin[matching].amax(0)


def sparse_matching(
    teacher: torch.Tensor,
    margin: torch.Tensor,
    matching: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Reduced:
    """Keep the single teacher channel that each student channel is matched to.

    ValueError: the matching does not have shape (1, S).
    """
    if matching.shape[0] != 1:
        raise ValueError(
            f"matching of {matching.shape[0]} teacher channels for each student channel; expected 1"
        )
    return reduced(teacher, matching, lambda responses: responses.squeeze(1)), margin[matching[0]]


REDUCERS = {
    "amp": absolute_max_pooling,
    "rd": random_drop,
    "sp": simple_pooling,
    "sm": sparse_matching,
}
