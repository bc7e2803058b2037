"""The views: MoCo's augmentations of one image, the centre crop, and the network's input from their bytes.

Views stay uint8 until they are on the device, a quarter of what floats would take through the loader and
the shuffle. Random numbers come from torch's global generator, which the data loader seeds for each view.
"""

import torch
from PIL import ImageFilter
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in [0, 1]


class GaussianBlur:
    """Blur a PIL image by a radius drawn between two, in pixels (SimCLR's augmentation, arXiv 2002.05709)."""

    def __init__(self, low: float = 0.1, high: float = 2.0):
        self.low, self.high = low, high

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(self.low, self.high).item()))


def random_view(size: int, aug_plus: bool, crop_min: float = 0.2) -> transforms.Compose:
    """Return PIL image -> random view (3, size, size) uint8: MoCo v2's augmentation if `aug_plus`, else v1's.

    crop_min: the smallest share of the image's area that a view shows.
    """
    if aug_plus:
        colour = [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([GaussianBlur()], p=0.5),
        ]
    else:
        colour = [transforms.RandomGrayscale(p=0.2), transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)]
    crop = transforms.RandomResizedCrop(size, scale=(crop_min, 1.0))
    return transforms.Compose([crop, *colour, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def crop_view(size: int) -> transforms.Compose:
    """Return PIL image -> random view (3, size, size) uint8 of a classifier's training: a crop, flipped or not."""
    return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def centre_view(size: int) -> transforms.Compose:
    """Return PIL image -> centre crop (3, size, size) uint8, with ImageNet's usual border of 32 in 256 pixels."""
    return transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), transforms.PILToTensor()])


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Return the network's input from uint8 images (B, 3, H, W): normalised floats, channels last; floats pass."""
    if images.dtype != torch.uint8:
        return images
    images = images.contiguous(memory_format=torch.channels_last)
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std
