"""Apply appearances to a batch on its device: (B, 3, H, W) in RGB, floats in 0..255.

The operations equal job/data/render.py's, except for the rounding between them. The images
of each operation are selected on the CPU, where the appearances are. So the CPU never waits for
the device.
"""

import torch
import torch.nn.functional as F

from moco.copies import to_device

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers of operations, as in job.data.render
UNCHANGED = torch.tensor([1.0, 0.0, 0.0])  # the weights with which `mix` returns its images
LUMA = (0.299, 0.587, 0.114)  # grey of R, G, B (ITU-R 601-2)
RADIUS = 6  # pixels: three times the largest standard deviation of a blur


def grey(images: torch.Tensor) -> torch.Tensor:
    """Return the grey of every pixel, (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def mix(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return weighted sums of each value, its pixel's grey and its image's mean grey.

    weights: (B, 3). Brightness, contrast and saturation are such sums.
    """
    of_value, of_grey, of_mean = weights.view(-1, 3, 1, 1).split(1, dim=1)  # (B, 1, 1, 1) each
    greys = grey(images)
    rest = torch.addcmul(of_mean * greys.mean((2, 3), keepdim=True), of_grey, greys)
    return torch.addcmul(rest, of_value, images).clamp_(0, 255)


def hue(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Shift every pixel's hue by a fraction of the circle."""
    red, green, blue = images.unbind(1)
    high = images.amax(1)  # (B, H, W)
    chroma = high - images.amin(1)
    # 0 for a colour without hue.
    between = torch.stack([green - blue, blue - red, red - green]) / chroma.clamp_min(1e-3)
    sixths = torch.where(
        high == red, between[0], torch.where(high == green, 2 + between[1], 4 + between[2])
    )
    turned = sixths + 6 * shifts[:, 0]
    # A channel has its maximum up to a sixth of the circle from its own hue. Over the next sixth
    # it falls to its minimum.
    angles = torch.stack([turned + 5, turned + 3, turned + 1], dim=1) % 6  # (B, 3, H, W)
    return high.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(angles, 4 - angles).clamp(0, 1)


def blur(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Blur images with Gaussians, cut off at three standard deviations.

    sigmas: (B,) in pixels. H and W must be above RADIUS.
    """
    B, _, H, W = images.shape
    # (2 RADIUS + 1,)
    distance = torch.arange(-RADIUS, RADIUS + 1, device=images.device, dtype=images.dtype)
    reach = (3 * sigmas).round().view(-1, 1)
    kernel = torch.where(
        distance.abs() <= reach, torch.exp(-0.5 * (distance / sigmas.view(-1, 1)).square()), 0.0
    )
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3B, 2 RADIUS + 1)
    wide = F.pad(images, [RADIUS] * 4, mode="reflect").reshape(
        1, 3 * B, H + 2 * RADIUS, W + 2 * RADIUS
    )
    rows = F.conv2d(wide, kernel[:, None, None, :], groups=3 * B)
    return F.conv2d(rows, kernel[:, None, :, None], groups=3 * B).view(B, 3, H, W)


def mix_weights(operations: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return the weights of `mix` (B, n, 3) for operations (B, n) and their factors (B, n).

    A hue has UNCHANGED.
    """
    rest = 1 - factors
    kinds = {
        BRIGHTNESS: torch.stack([factors, 0 * rest, 0 * rest], dim=2),
        CONTRAST: torch.stack([factors, 0 * rest, rest], dim=2),
        SATURATION: torch.stack([factors, rest, 0 * rest], dim=2),
    }
    weights = UNCHANGED.expand(*operations.shape, 3)
    for number, kind in kinds.items():
        weights = torch.where((operations == number).unsqueeze(2), kind, weights)
    return weights


def render(images: torch.Tensor, appearances: torch.Tensor) -> torch.Tensor:
    """Apply appearances (B, 12) of job.data.augment, on the CPU, to images (B, 3, H, W) uint8.

    An image's hue is shifted once, after some of its other operations and before the rest. So all
    images need the same few passes: mixtures, one shift of hues, mixtures.
    """
    operations, factors, sigmas, flips = appearances.split([5, 5, 1, 1], dim=1)
    steps, is_hue = torch.arange(operations.shape[1]), operations == HUE  # (5,), (B, 5)
    hue_step = torch.where(is_hue.any(1), is_hue.int().argmax(1), -1).unsqueeze(1)  # (B, 1)
    weights = mix_weights(operations, factors)  # (B, 5, 3)
    halves = [
        torch.where(half.unsqueeze(2), weights, UNCHANGED)
        for half in (steps < hue_step, steps > hue_step)
    ]
    before, after = (
        [each for each in half.unbind(1) if (each != UNCHANGED).any()] for half in halves
    )
    rows = [
        chosen.nonzero()[:, 0]
        for chosen in (hue_step[:, 0] >= 0, sigmas[:, 0] > 0, flips[:, 0] > 0)
    ]

    # One copy for the weights of all passes, one for the indices of all others.
    tables = torch.stack(
        [
            *before,
            *after,
            torch.cat([(factors * is_hue).sum(1, keepdim=True), sigmas, flips], dim=1),
        ]
    )
    *mixtures, amounts = to_device(tables, images.device)
    hued, blurred, flipped = to_device(torch.cat(rows), images.device).split(
        [len(each) for each in rows]
    )

    rendered = images.to(torch.float32, memory_format=torch.contiguous_format)
    for mixture in mixtures[: len(before)]:
        rendered = mix(rendered, mixture)
    if len(hued):
        moved = hue(
            rendered.index_select(0, hued), amounts[:, 0].index_select(0, hued).view(-1, 1, 1, 1)
        )
        rendered.index_copy_(0, hued, moved)
    for mixture in mixtures[len(before) :]:
        rendered = mix(rendered, mixture)
    if len(blurred):
        moved = blur(rendered.index_select(0, blurred), amounts[:, 1].index_select(0, blurred))
        rendered.index_copy_(0, blurred, moved)
    if len(flipped):
        rendered.index_copy_(0, flipped, rendered.index_select(0, flipped).flip(3))
    return rendered.round_().to(torch.uint8)
