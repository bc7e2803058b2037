"""Matching of pooled features: one value per channel and image instead of a map.

P = H x W positions. g = mean over the positions of relu(x) (B, C), of the last stage's features x.
"""

import torch
import torch.nn.functional as F
from torch import nn

# A channel is constant if its variance over its mean square is at most this. Rounding reaches 1e-9.
CONSTANT = 1e-6


def pool(maps: torch.Tensor) -> torch.Tensor:
    """Return pooled features g, (B, C, H, W) before the last ReLU -> (B, C) float32."""
    return maps.relu().mean((2, 3), dtype=torch.float32)


@torch.no_grad()
def pooled_sums(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the sums over images that `pooled_cost` needs, (S + 2, T + 2) float64.

    student (B, S, H, W), teacher (B, T, H, W). x and y are the L2-normalised g of each image. The
    entries are sums of x_a y_b. The last two rows sum y_b and y_b^2, the last two columns x_a and
    x_a^2. The entry [S, T] counts the images. An image adds at most 1 to an entry. Add the sums of
    several batches.
    """
    x, y = (F.normalize(pool(maps), dim=1).double() for maps in (student, teacher))
    one = x.new_ones(len(x), 1)
    sums = torch.cat([x, one, one], 1).T @ torch.cat([y, one, one], 1)  # (S + 2, T + 2)
    sums[-1, :-2], sums[:-2, -1] = y.square().sum(0), x.square().sum(0)
    return sums


def pooled_cost(sums: torch.Tensor) -> torch.Tensor:
    """Return the cost (S, T) float64: mean squared distances of standardised channels.

    C[a, b] = mean over images of (z_a - z_b)^2 = 2 - 2 corr(x_a, y_b), where z is a channel with
    mean 0 and variance 1. A constant channel has z = 0. Its distance is 1 to a varying channel and
    0 to a constant one. `channel_cost` compares positions within an image, but a pooled feature has
    only one position. Cosines would compare means, because all g are positive and nearly parallel.

    sums: `pooled_sums` of all images, or any multiple of them.
    """
    S = len(sums) - 2
    means = sums / sums[S, -2]
    x, y = means[:S, -2], means[S, :-2]  # (S,), (T,)
    scale_x, live_x = inverse_deviation(x, means[:S, -1])
    scale_y, live_y = inverse_deviation(y, means[-1, :-2])
    correlation = scale_x[:, None] * (means[:S, :-2] - x[:, None] * y) * scale_y  # (S, T)
    return live_x[:, None] + live_y - 2 * correlation


def inverse_deviation(
    mean: torch.Tensor, square: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 / deviation and 1.0 of each channel (C,), or 0 and 0.0 if it is constant."""
    variance = square - mean.square()
    live = variance > CONSTANT * square
    return variance.where(live, 1.0).rsqrt() * live, live.double()


class PooledMatching(nn.Module):
    """The distance of the student's pooled features from the teacher's, reduced by a matching.

    For each image, h = mean over the matched group of the teacher's g, (B, S), and

        loss = S P |u - v|^2 = S P (2 - 2 cos(u, v)),  u = BN(g_s) / |BN(g_s)|,  v = h / |h|.

    BN is a learnt batch norm, so a channel's scale and shift are free, as in the cost. Pooling
    commutes with the mean, so h is the pooled feature of the mean channel. `amp` is not needed,
    because g is never negative. Partial L2 is not needed, because each g is above its negative
    margin. Normalised vectors do not depend on the teacher's scale. S P makes the loss a sum over
    channels and positions, like a stage's loss, so a weight means the same for any image size. The
    loss of an image is at most 4 S P.

    The matching (G, S) int64 is a buffer. channels: (S, T). groups: G (default: T // S).
    ValueError: the teacher has fewer channels than the student.
    """

    matching: torch.Tensor

    def __init__(self, S: int, T: int, groups: int | None = None):
        super().__init__()
        if T < S:
            raise ValueError(
                f"pooled features: a teacher of {T} channels has too few for a student of {S}"
            )
        groups = T // S if groups is None else groups
        self.channels = S, T
        self.bn = nn.BatchNorm2d(S)
        self.register_buffer("matching", torch.arange(groups * S).view(groups, S))

    @torch.no_grad()
    def target(self, teacher: torch.Tensor) -> torch.Tensor:
        """Return v (B, S) of the teacher's last features before the last ReLU, (B, T, H, W)."""
        return F.normalize(pool(teacher)[:, self.matching].mean(1), dim=1)

    def forward(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of student features (B, S, H, W), a scalar summed over the images."""
        S, P = student.shape[1], student.shape[2:].numel()
        normalised = self.bn(pool(student)[:, :, None, None]).flatten(1)  # (B, S)
        return S * P * (F.normalize(normalised, dim=1) - target).square().sum()
