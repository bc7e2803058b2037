"""Estimate the GPU-hours of the published recipes on ImageNet.

    python tests/campaigns/bench/cost.py

These figures are derived, not measured. The recipe `imagenet` is assumed to train at RATE images/s
on an A100 in bf16. The other recipes' rates follow from the multiplications and additions of an
image's passes, as if all passes used the GPU equally well. Forward and backward count as three
forward passes. --rate sets another rate, such as the bench's `gpu_bf16_images_per_s`.
"""

import argparse
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from job.config import Config, read_config

IMAGES = 1_281_167  # in ImageNet's training set
RATE = 2100.0  # images/s of `imagenet` on an A100, assumed
GPUS = 8
TRAIN = 3  # forward and backward passes, in forward passes


@dataclass(frozen=True)
class Recipe:
    """A recipe's name, its options, and its published linear top-1 accuracy in percent."""

    name: str
    options: str
    published: str


REFERENCE = "`imagenet`: MGD"
TEACHER = "--teacher TEACHER.pth.tar"
RECIPES = (
    Recipe("MoCo v2, ResNet-50: the teacher", "--config imagenet -a resnet50", "67.5"),
    Recipe("MoCo v2, 800 epochs", "--config imagenet -a resnet50 --epochs 800", "71.1"),
    Recipe("`imagenet` without teacher", "--config imagenet", "52.5"),
    Recipe(REFERENCE, f"--config imagenet {TEACHER}", "53.6"),
    Recipe("the same, ResNet-34", f"--config imagenet -a resnet34 {TEACHER}", "58.5"),
    Recipe("`simreg`", f"--config simreg {TEACHER}", "65.1"),
    Recipe("`seed`", f"--config seed {TEACHER}", "57.6"),
    Recipe("`compress`", f"--config compress {TEACHER}", "62.6"),
    Recipe("`disco`", f"--config disco {TEACHER}", "60.6"),
    Recipe("`simsiam`, ResNet-50", "--config simsiam -a resnet50", "68.1"),
)


def forward(arch: str) -> float:
    """Return the multiplications of a network's forward pass at 224 pixels, in 10**9."""
    with torch.device("meta"):
        net = getattr(models, arch)()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        net(images)
    return counter.get_total_flops() / 2 / 1e9


def passes(config: Config, student: float, teacher: float) -> dict[str, float]:
    """Return the multiplications of an image's passes, in 10**9, by network.

    student, teacher: multiplications of a forward pass, in 10**9.
    """
    disco = bool(config.teacher) and "disco" in config.distill
    views = 2 if config.framework == "simsiam" or disco else 1  # of the student
    distilled = config.mgd_views if config.framework == "simsiam" else views
    work = {"student": TRAIN * views * student}
    if config.framework == "moco":
        work["keys"] = student
    if config.teacher:
        work["teacher"] = distilled * teacher
        if "similarity" in config.distill and config.similarity == "compress":
            work["copy"] = student
    return work


def hours(config: Config, work: float, reference: float, rate: float) -> float:
    """Return the GPU-hours of a recipe.

    work, reference: multiplications of an image's passes, of the recipe and of `imagenet`.
    """
    return config.epochs * IMAGES * work / (reference * rate) / 3600


def rows(rate: float) -> list[list[str]]:
    """Return the table's rows: recipe, epochs, passes, GPU-hours, hours on GPUS GPUs, published."""
    cost = {arch: forward(arch) for arch in ("resnet18", "resnet34", "resnet50")}
    works, table = [], []
    for recipe in RECIPES:
        config = read_config(["IMAGENET", *recipe.options.split()])
        work = passes(config, cost[config.arch], cost["resnet50"])
        works.append((recipe, config, work))
    [reference] = [sum(work.values()) for recipe, _, work in works if recipe.name == REFERENCE]
    for recipe, config, work in works:
        total = sum(work.values())
        gpu_hours = hours(config, total, reference, rate)
        shown = " + ".join(f"{value:.1f}" for value in work.values())
        shown += f" = {total:.1f}" if len(work) > 1 else ""
        epochs, spent = str(config.epochs), f"{gpu_hours:.0f}"
        table.append(
            [recipe.name, epochs, shown, spent, f"{gpu_hours / GPUS:.1f}", recipe.published]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=RATE, help="images/s of `imagenet` on a GPU")
    options = parser.parse_args()
    for row in rows(options.rate):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
