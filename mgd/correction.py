"""A learnt correction that lets a student deviate from its matching."""

import torch
import torch.nn.functional as F
from torch import nn


class Correction(nn.Module):
    """A 1x1 convolution added to its input: s + W s, where W (S, S) starts at 0.

    Student channel a imitates the teacher channels matched to it. With W, the sum of a and of
    multiples of all other channels does. So the student can mix its channels differently from the
    teacher. The initial output equals the input bit for bit. No random numbers are drawn.
    """

    def __init__(self, S: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(S, S, 1, 1))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the corrected maps, (B, S, H, W) -> (B, S, H, W)."""
        return maps + F.conv2d(maps, self.weight)
