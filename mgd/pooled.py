"""Matching of pooled features: one number a channel and image, in place of a map.

P = H x W positions. g = mean over the positions of relu(x) (B, C), of the last stage's features x.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONSTANT = (
    1e-6  # variance over mean square up to which a channel is constant: rounding reaches 1e-9
)


def pool(maps: torch.Tensor) -> torch.Tensor:
    """Return pooled features g, (B, C, H, W) before the last ReLU -> (B, C) float32."""
    return maps.relu().mean((2, 3), dtype=torch.float32)


@torch.no_grad()
def pooled_sums(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the sums over images from which `pooled_cost` is computed, (S + 2, T + 2) float64.

    student (B, S, H, W), teacher (B, T, H, W). x and y are the L2-normalised g of each image. The
    entries are sums of x_a y_b, and in the last two rows and columns of y_b, y_b^2, x_a, x_a^2. The
    entry [S, T] counts the images. No image adds more than 1 to an entry. Add the sums of batches.
    """
    x, y = (F.normalize(pool(maps), dim=1).double() for maps in (student, teacher))
    one = x.new_ones(len(x), 1)
    sums = torch.cat([x, one, one], 1).T @ torch.cat([y, one, one], 1)  # (S + 2, T + 2)
    sums[-1, :-2], sums[:-2, -1] = y.square().sum(0), x.square().sum(0)
    return sums


def pooled_cost(sums: torch.Tensor) -> torch.Tensor:
    """Return the costs (S, T) float64: squared distances of standardised channels, over all images.

    C[a, b] = mean over images of (z_a - z_b)^2 = 2 - 2 corr(x_a, y_b), where z is a channel with mean
    0 and variance 1. A constant channel has z = 0: its distance to another is 1, or 0 if both are.
    The cost of maps compares positions within an image, of which a pooled feature has one only.
    Cosines would compare means: all g are positive, and nearly parallel.

    sums: `pooled_sums` of all images, or any multiple.
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

    BN is a learnt batch norm: a channel's scale and shift are free, as in the cost. Pooling commutes
    with the mean, so h is pooled features of mean channels. `amp` has no use here: g has no negative
    values. Partial L2 has none either: each g is above its margin, which is negative. Normalised
    vectors do not depend on the teacher's scale. S P makes the loss a sum over channels and positions
    like a stage's, so that a weight means the same for any image size. It is at most 4 S P.

    The matching (G, S) int64 is a buffer; channels is (S, T). groups: G (default: T // S).
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
        """Return v of the teacher's last features (B, T, H, W) before the last ReLU, (B, S)."""
        return F.normalize(pool(teacher)[:, self.matching].mean(1), dim=1)

    def forward(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss, summed over the images, of student features (B, S, H, W), a scalar."""
        S, P = student.shape[1], student.shape[2:].numel()
        normalised = self.bn(pool(student)[:, :, None, None]).flatten(1)  # (B, S)
        return S * P * (F.normalize(normalised, dim=1) - target).square().sum()
