"""Measure the bare passes of a training: the least that a step of its method computes.

They are the forward and backward of the student for each of its views, with the heads that the
method trains, and the forward of key encoder, momentum encoder and teacher for their views. A
distiller's trained convolution is a head on maps. All views of the student go forward before any
goes backward, as in the program.
"""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn

import setting
from job.data.augment import normalize
from job.distill.pooled import pooled
from job.distill.projector import Regression
from job.networks import DEPTH, HEAD, UNDER_HEAD
from job.training import Training


class Passes:
    """The passes of a training's networks, without losses, queues, updates and communication."""

    def __init__(self, training: Training):
        config, run, framework = training.config, training.run, training.framework
        distillation = training.distillation
        self.autocast = functools.partial(run.autocast, config.precision)
        self.views = framework.student_views
        self.distilled = framework.distilled_views if distillation.distillers else 0
        # Copies, because the gradients of the training's own networks go into its buckets.
        self.student = copied(framework.encoder)
        self.predictor = copied(getattr(framework.module, "predictor", nn.Identity()))
        modules = [each.module for each in distillation.distillers]
        self.heads = [head for module in modules for head in find_heads(module)]
        self.has_loss = bool(framework.losses)
        self.others: dict[str, tuple[nn.Module, int]] = {}  # passes without gradient, by name
        if hasattr(framework.module, "encoder_k"):
            self.others["key"] = copied(framework.module.encoder_k), 1
        if distillation.networks:
            self.others["teacher"] = distillation.networks.teacher.net, self.distilled
        if distillation.momentum:
            self.others["momentum"] = copied(distillation.momentum.module), self.distilled
        shape = training.batch_size, 3, config.image_size, config.image_size
        images = torch.randint(256, shape, dtype=torch.uint8, device=run.device)
        self.images = normalize(images)

    def __call__(self) -> dict[str, float]:
        """Do the passes. Return the seconds of each network, and their sum."""
        seconds = {"student": setting.seconds(self.train)}
        for name, (net, views) in self.others.items():
            seconds[name] = setting.seconds(functools.partial(self.forward, net, views))
        return seconds | {"bare": sum(seconds.values())}

    def train(self) -> None:
        """Pass all views forward, then backward."""
        for module in (self.student, self.predictor, *(head for _, head in self.heads)):
            module.zero_grad()
        with self.autocast():
            ends = self.ends([self.student(self.images) for _ in range(self.views)])
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    def ends(self, views: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Return the outputs that losses read, from the features of each view.

        With losses on maps only, these are the last maps.
        """
        ends = [self.predictor(view[HEAD]) for view in views] if self.has_loss else []
        for name, head in self.heads:
            inputs = [pooled(view) if name == UNDER_HEAD else view[name] for view in views]
            ends += [head(each) for each in inputs[: self.distilled]]
        return ends or [view[f"layer{DEPTH}"] for view in views]

    def forward(self, net: nn.Module, views: int) -> None:
        """Pass views through a network without gradients."""
        with torch.no_grad(), self.autocast():
            for _ in range(views):
                net(self.images)


def find_heads(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield copies of a distiller's heads, each with the name of the features that it reads."""
    for name, child in module.named_children():
        if name == "head":
            yield UNDER_HEAD, copied(child)
        elif name.startswith("correction"):
            yield f"layer{name[-1]}", copied(child)
        elif isinstance(child, Regression):  # it computes no convolution, but replaces one
            T, S = child.weight.shape
            yield f"layer{name[-1]}", nn.Conv2d(S, T, 1, bias=False).to(child.weight)


def copied(net: nn.Module) -> nn.Module:
    """Return a copy of a network that is not compiled, without the clocks of `Breakdown`."""
    copy_of_net = copy.deepcopy(net)
    copy_of_net.__dict__.pop("forward", None)
    return copy_of_net
