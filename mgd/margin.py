"""The margin under which a teacher's response says no more than "not here"."""

import torch

TAIL = 0.001  # where less of the distribution than this is negative, the mean of that part means nothing


def margin_from_bn(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the expected negative response of each channel of a batch norm, (T,) -> (T,).

    A batch norm's output is taken as normal with mean m = bias and deviation sigma = |weight|; the
    margin is E[x | x < 0] = m - sigma phi(m / sigma) / Phi(-m / sigma), and -3 sigma where
    Phi(-m / sigma) <= 0.001 (Heo et al., arXiv 1904.01866, eq. 6, as MGD uses it).
    """
    mean, sigma = bias.double(), weight.double().abs()
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    z = torch.where(
        sigma > 0, mean / sigma.clamp_min(torch.finfo(torch.float64).tiny), mean.sign() * torch.inf
    )
    tail = normal.cdf(-z)
    density = normal.log_prob(z).exp()
    margin = torch.where(tail > TAIL, mean - sigma * density / tail.clamp_min(TAIL), -3 * sigma)
    # A channel without spread is the constant m: its expected negative response is m itself, if negative.
    return torch.where(sigma > 0, margin, mean.clamp_max(0.0)).to(weight.dtype)
