"""DisCo: loss and gradients against a slow loop in float64, and its preset."""

import numpy as np
import pytest
import torch
from distillers import HEAD, B, S, T, array, build, by_image, check_gradient, features, unit

from job.config import read_config
from job.distill.base import Networks
from job.distill.distillation import Distillation
from job.frameworks.base import Output
from job.position import START

shared = pytest.mark.parametrize("head", [HEAD, 0, HEAD + 1])  # outputs of the framework's head


def slow_loss(student, teacher):
    """Return the mean squared difference of unit vectors, value by value."""
    loss = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for s, t in zip(unit(ours), unit(theirs), strict=True):
            loss += (s - t) ** 2 / B / HEAD
    return loss


def through(head, vector):
    hidden = np.maximum(head["0.weight"] @ vector + head["0.bias"], 0)
    return head["2.weight"] @ hidden + head["2.bias"]


@shared
def test_loss_and_gradients_equal_slow_loop(head):
    """The head is the framework's if it has as many outputs as the teacher's, else DisCo's own."""
    distiller = build("disco", head, head_width=11)
    student, teacher = features(S, 1, head), features(T, 2, HEAD)
    loss = distiller.loss(student, distiller.targets(teacher, None))
    loss.backward()
    target, own = array(teacher["fc"]), head != HEAD
    assert [name for name, _ in distiller.module.named_children()] == ["head"] * own
    if not own:
        assert loss.item() == pytest.approx(slow_loss(array(student["fc"]), target), rel=1e-5)
        check_gradient(student["fc"], lambda value: slow_loss(value, target))
        assert student["layer4"].grad is None
        return
    layers = {name: array(value) for name, value in distiller.module.head.state_dict().items()}
    assert [len(layers[name]) for name in ("0.bias", "2.bias")] == [11, HEAD]

    def slow(maps, layers=layers):
        return slow_loss([through(layers, pooled) for pooled in by_image(maps)], target)

    maps = array(student["layer4"])
    assert loss.item() == pytest.approx(slow(maps), rel=1e-5)
    check_gradient(student["layer4"], slow)
    for name, value in distiller.module.head.named_parameters():
        check_gradient(value, lambda new, name=name: slow(maps, layers | {name: new}))


def test_preset_is_published_recipe():
    """32 times the loss of the queries plus 32 times the loss of the keys."""
    config = read_config(["DIR", "--config", "disco"])
    assert (config.framework, config.distill, config.head_width, config.mlp) == (
        "moco",
        ["disco"],
        2048,
        True,
    )
    assert (config.lr, config.batch_size, config.epochs, config.moco_t) == (0.03, 256, 200, 0.2)
    assert config.cos and config.aug_plus and config.loss_share == 0
    distiller = build("disco", HEAD, loss_factor=config.loss_factor)
    student, teacher = (
        [features(width, seed, HEAD) for seed in seeds]
        for width, seeds in ((S, (1, 2)), (T, (3, 4)))
    )
    distillation = Distillation(config, Networks(None, None, None, None), [distiller])
    output = Output({}, student[0], torch.zeros(B, 1), {}, (student[1],))
    actual = distillation.losses(
        output, [[distiller.targets(each, None) for each in teacher]], START, 1
    )
    each = [
        slow_loss(array(s["fc"]), array(t["fc"])) for s, t in zip(student, teacher, strict=True)
    ]
    assert actual["disco"].item() == pytest.approx(32 * sum(each), rel=1e-5)


def test_loss_is_mean_over_images():
    """The mean of the losses of both halves is the loss of all images."""
    distiller = build("disco", HEAD)
    student, targets = features(S, 1, HEAD), distiller.targets(features(T, 2, HEAD), None)
    half = B // 2
    halves = [
        distiller.loss({"fc": student["fc"][rows]}, targets[rows]).item()
        for rows in (slice(half), slice(half, 2 * half))
    ]
    both = distiller.loss({"fc": student["fc"][: 2 * half]}, targets[: 2 * half]).item()
    assert sum(halves) / 2 == pytest.approx(both, rel=1e-5)
