"""SimReg: loss and gradients against a slow loop in float64, its head, and its preset."""

import numpy as np
import pytest
import torch
from distillers import B, S, T, array, build, by_image, check_gradient, features, unit

from job.config import read_config


def through(head, inputs):
    """Return the head's outputs for vectors, with the statistics of these vectors."""
    x = np.stack(inputs)
    for number in (0, 3, 4, 7):
        x = x @ head[f"{number}.weight"].T + head[f"{number}.bias"]
        if number in (0, 4):
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = np.maximum(x * head[f"{number + 1}.weight"] + head[f"{number + 1}.bias"], 0)
    return x


def slow_loss(head, student, teacher):
    """Return the mean squared distance of unit vectors, image by image."""
    predicted = through(head, by_image(student))
    loss = 0.0
    for ours, theirs in zip(predicted, by_image(teacher), strict=True):
        difference = unit(ours) - unit(theirs)
        loss += (difference * difference).sum() / B
    return loss


def test_loss_and_gradients_equal_slow_loop():
    distiller = build("simreg")
    student, teacher = features(S, 1), features(T, 2)
    loss = distiller.loss(student, distiller.targets(teacher, None))
    loss.backward()
    head = {
        name.removeprefix("head."): array(value)
        for name, value in distiller.module.state_dict().items()
    }
    maps = array(teacher["layer4"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(head, array(student["layer4"]), maps), rel=1e-5)
    check_gradient(student["layer4"], lambda value: slow_loss(head, value, maps))
    for name, value in distiller.module.get_submodule("head").named_parameters():
        check_gradient(
            value,
            lambda new, name=name: slow_loss(head | {name: new}, array(student["layer4"]), maps),
        )


def test_factor_divides_mean_over_images():
    """Twice the same images have the same loss."""
    one, other = build("simreg"), build("simreg", loss_factor=4.0)
    student, teacher = features(S, 1), features(T, 2)
    loss = one.loss(student, one.targets(teacher, None)).item()
    assert other.loss(student, other.targets(teacher, None)).item() == pytest.approx(loss / 4)
    doubled = [{"layer4": torch.cat([each["layer4"]] * 2)} for each in (student, teacher)]
    assert one.loss(doubled[0], one.targets(doubled[1], None)).item() == pytest.approx(
        loss, rel=1e-5
    )


def test_silent_teacher_gives_finite_gradient():
    distiller = build("simreg")
    student, teacher = features(S, 1), features(T, 2)
    with torch.no_grad():
        teacher["layer4"][0] = -1.0
    loss = distiller.loss(student, distiller.targets(teacher, None))
    loss.backward()
    assert loss.isfinite() and student["layer4"].grad.isfinite().all()


@pytest.mark.parametrize(("head_width", "hidden"), [(0, 2 * S), (17, 17)])
def test_head_has_given_widths(head_width, hidden):
    head = build("simreg", head_width=head_width).module.get_submodule("head")
    shapes = [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(hidden, S), (S, hidden), (hidden, S), (T, hidden)]
    assert all(layer.bias is not None for layer in head if isinstance(layer, torch.nn.Linear))


def test_preset_is_published_recipe():
    config = read_config(["DIR", "--config", "simreg"])
    assert (config.framework, config.distill) == ("none", ["simreg"])
    assert (config.lr, config.batch_size, config.epochs, config.weight_decay) == (
        0.05,
        256,
        130,
        1e-4,
    )
    assert config.cos and config.weak_views and config.crop_min == 0.2 and config.warmup_epochs == 0
    assert (config.loss_share, config.loss_factor) == (0, 1)
