"""The margin of a teacher channel: responses below it only mean "feature absent"."""

import torch

TAIL = 0.001  # smallest negative fraction of the distribution whose mean is meaningful


def margin_from_bn(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the expected negative response of each channel of a batch norm, (T,) -> (T,).

    The output of the batch norm is assumed normal, with mean m = bias and standard deviation
    sigma = |weight|. The margin is E[x | x < 0] = m - sigma phi(m / sigma) / Phi(-m / sigma). It is
    -3 sigma if Phi(-m / sigma) <= 0.001 (Heo et al., arXiv 1904.01866, eq. 6, as MGD uses it).
    """
    mean, sigma = bias.double(), weight.double().abs()
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    z = torch.where(
        sigma > 0, mean / sigma.clamp_min(torch.finfo(torch.float64).tiny), mean.sign() * torch.inf
    )
    tail = normal.cdf(-z)
    density = normal.log_prob(z).exp()
    margin = torch.where(tail > TAIL, mean - sigma * density / tail.clamp_min(TAIL), -3 * sigma)
    # If sigma = 0, the channel is the constant m. Its margin is m if m is negative, otherwise 0.
    return torch.where(sigma > 0, margin, mean.clamp_max(0.0)).to(weight.dtype)
