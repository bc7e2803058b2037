"""The learnt correction of a stage's student features, before its batch norm."""

import numpy as np
import pytest
import torch

from mgd.correction import Correction
from mgd.distiller import MGDistiller

CHANNELS = {2: (3, 7), 4: (2, 4)}
SIDES = {2: 3, 4: 2}
B = 4


def build(correction=True, seed=0):
    """Return a distiller with random batch norms and, if it has them, random corrections."""
    random = torch.Generator().manual_seed(seed)
    distiller = MGDistiller(CHANNELS, factor=10.0, correction=correction)
    with torch.no_grad():
        for stage in CHANNELS:
            norm = distiller.get_submodule(f"bn{stage}")
            norm.weight.copy_(torch.randn(norm.weight.shape, generator=random))
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=random))
        for name, value in distiller.named_parameters():
            if name.startswith("correction"):
                value.copy_(torch.randn(value.shape, generator=random))
    return distiller


def features(which, seed=1):
    """Return features of each stage, from the student (which = 0) or the teacher (1)."""
    random = torch.Generator().manual_seed(seed + which)
    shapes = [(B, CHANNELS[stage][which], SIDES[stage], SIDES[stage]) for stage in CHANNELS]
    return [torch.randn(shape, generator=random) for shape in shapes]


def slow_correction(maps, W):
    """Return s + W s, channel by channel, in numpy: maps (B, S, H, W), W (S, S)."""
    moved = maps.copy()
    for a in range(len(W)):
        for c in range(len(W)):
            moved[:, a] += W[a, c] * maps[:, c]
    return moved


def slow_loss(distiller, student, teacher, weights):
    """Return the loss by its definition, in numpy. weights: {stage: W (S, S)}."""
    total = 0.0
    for stage, s, (target, margin) in zip(
        CHANNELS, student, distiller.targets(teacher), strict=True
    ):
        x = slow_correction(s, weights[stage])
        norm = distiller.get_submodule(f"bn{stage}")
        for a in range(x.shape[1]):
            mean, variance = x[:, a].mean(), x[:, a].var()
            scale, shift = norm.weight[a].item(), norm.bias[a].item()
            y = scale * (x[:, a] - mean) / np.sqrt(variance + 1e-5) + shift
            t = np.maximum(target[:, a].double().numpy(), margin[a].item())
            total += ((y - t) ** 2)[(y > t) | (t > 0)].sum() / 2 ** (4 - stage)
    return total / (B * 10.0)


def corrections(distiller):
    """Return {stage: W (S, S)} of a distiller, in numpy."""
    weights = {stage: distiller.get_parameter(f"correction{stage}.weight") for stage in CHANNELS}
    return {stage: value.detach().double().numpy()[:, :, 0, 0] for stage, value in weights.items()}


def test_loss_uses_corrected_features():
    distiller, student, teacher = build(), features(0), features(1)
    loss = distiller(student, distiller.targets(teacher)).item()
    arrays = [s.double().numpy() for s in student]
    assert loss == pytest.approx(
        slow_loss(distiller, arrays, teacher, corrections(distiller)), rel=1e-4
    )


def test_gradients_are_slopes():
    distiller, student, teacher = build(), features(0), features(1)
    for s in student:
        s.requires_grad_()
    distiller(student, distiller.targets(teacher)).backward()
    arrays, weights = [s.detach().double().numpy() for s in student], corrections(distiller)
    random = np.random.default_rng(2)
    for index, stage in enumerate(CHANNELS):
        gradients = {
            "s": student[index].grad,
            "W": distiller.get_parameter(f"correction{stage}.weight").grad[:, :, 0, 0],
        }
        for name, gradient in gradients.items():
            direction = random.standard_normal(gradient.shape)

            def moved(step, name=name, index=index, stage=stage, direction=direction):
                maps, W = list(arrays), dict(weights)
                if name == "s":
                    maps[index] = maps[index] + step * direction
                else:
                    W[stage] = W[stage] + step * direction
                return slow_loss(distiller, maps, teacher, W)

            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
            assert (gradient.double().numpy() * direction).sum() == pytest.approx(
                slope, rel=1e-3, abs=1e-5
            )


def test_new_correction_is_identity():
    """Loss and gradients have the same bytes, and no random numbers are drawn."""
    torch.manual_seed(3)
    corrected = MGDistiller(CHANNELS, correction=True)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    plain = MGDistiller(CHANNELS)
    assert torch.equal(torch.rand(1), drawn)
    gradients = []
    for distiller in (plain, corrected):
        student = [s.requires_grad_() for s in features(0)]
        loss = distiller(student, distiller.targets(features(1)))
        loss.backward()
        gradients.append([loss, *(s.grad for s in student)])
    assert all(map(torch.equal, *gradients))
    assert all(
        corrected.get_parameter(f"correction{stage}.weight").grad.any() for stage in CHANNELS
    )


def test_state_of_correction():
    plain, corrected = (
        set(MGDistiller(CHANNELS, correction=on).state_dict()) for on in (False, True)
    )
    assert corrected - plain == {"correction2.weight", "correction4.weight"}
    assert not any("correction" in name for name in plain)
    assert Correction(5).weight.shape == (5, 5, 1, 1)


@pytest.mark.parametrize("stage", CHANNELS)
def test_corrected_equals_slow_loop(stage):
    maps = features(0)[list(CHANNELS).index(stage)]
    expected = slow_correction(maps.double().numpy(), corrections(build())[stage])
    torch.testing.assert_close(
        build().corrected(stage, maps).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5
    )
    assert build(correction=False).corrected(stage, maps) is maps
