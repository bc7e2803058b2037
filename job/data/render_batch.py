"""What appearances do to a batch of images, in torch on their device: (B, 3, H, W) in RGB, floats in 0..255.

The same operations as job/data/render.py does on one image, but for the rounding between them. Which images an operation
is for is decided on the CPU, where the appearances are, so that the device is never waited for.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moco.copies import to_device

# An operation, and its amounts (B,).
Change = tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.Tensor]

LUMA = (0.299, 0.587, 0.114)  # grey of R, G, B (ITU-R 601-2)
RADIUS = 6  # pixels: three times the largest standard deviation of a blur


def grey(images: torch.Tensor) -> torch.Tensor:
    """Return the grey of every pixel, (B, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Every value times the factor."""
    return (images * factors).clamp_(0, 255)


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Every value's distance from its image's mean grey times the factor."""
    return torch.lerp(grey(images).mean((2, 3), keepdim=True), images, factors).clamp_(0, 255)


def saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Every pixel's distance from its own grey times the factor: 0 makes it grey."""
    return torch.lerp(grey(images), images, factors).clamp_(0, 255)


def hue(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Every pixel's hue moved by a share of the circle."""
    red, green, blue = images.unbind(1)
    high = images.amax(1)  # (B, H, W)
    chroma = high - images.amin(1)
    between = torch.stack([green - blue, blue - red, red - green]) / chroma.clamp_min(1e-3)  # of a colour without hue, 0
    sixths = torch.where(high == red, between[0], torch.where(high == green, 2 + between[1], 4 + between[2]))
    turned = sixths + 6 * shifts[:, 0]
    # A channel is at the top within a sixth of the circle of its own hue, and falls to the bottom within another.
    places = torch.stack([turned + 5, turned + 3, turned + 1], dim=1) % 6  # (B, 3, H, W)
    return high.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(places, 4 - places).clamp(0, 1)


OPERATIONS = (brightness, contrast, saturation, hue)  # in the order of job.data.render


def blur(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Gaussian blurs of standard deviations (B,) in pixels, cut off at three of them; H and W are above RADIUS."""
    B, _, H, W = images.shape
    distance = torch.arange(-RADIUS, RADIUS + 1, device=images.device, dtype=images.dtype)  # (2 RADIUS + 1,)
    reach = (3 * sigmas).round().view(-1, 1)
    kernel = torch.where(distance.abs() <= reach, torch.exp(-0.5 * (distance / sigmas.view(-1, 1)).square()), 0.0)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3B, 2 RADIUS + 1)
    wide = F.pad(images, [RADIUS] * 4, mode="reflect").reshape(1, 3 * B, H + 2 * RADIUS, W + 2 * RADIUS)
    rows = F.conv2d(wide, kernel[:, None, None, :], groups=3 * B)
    return F.conv2d(rows, kernel[:, None, :, None], groups=3 * B).view(B, 3, H, W)


def mirror(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Every row of pixels from right to left."""
    return images.flip(3)


def render(images: torch.Tensor, appearances: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) uint8 as their appearances (B, 12) of job.data.augment, on the CPU, have them."""
    operations, _, sigmas, flips = appearances.split([5, 5, 1, 1], dim=1)
    _, factors, *others = to_device(appearances, images.device).split([5, 5, 1, 1], dim=1)
    steps: list[tuple[torch.Tensor, Change]] = []  # whether for an image, (B,); and what changes it
    for turn in range(operations.shape[1]):
        amounts = factors[:, turn]
        steps += [(operations[:, turn] == n, (each, amounts)) for n, each in enumerate(OPERATIONS)]
    steps += [(sigmas[:, 0] > 0, (blur, others[0][:, 0])), (flips[:, 0] > 0, (mirror, others[1][:, 0]))]
    rows = [chosen.nonzero()[:, 0] for chosen, _ in steps]
    # One copy for the indices of all steps.
    indices = to_device(torch.cat(rows), images.device).split([len(each) for each in rows])
    rendered = images.to(torch.float32, memory_format=torch.contiguous_format)
    for there, (_, (change, amounts)) in zip(indices, steps, strict=True):
        if len(there):
            mine = amounts.index_select(0, there).view(-1, 1, 1, 1)
            rendered.index_copy_(0, there, change(rendered.index_select(0, there), mine))
    return rendered.round_().to(torch.uint8)
