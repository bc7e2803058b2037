"""Synchronised batch norm on one worker, compared with torch's.

tests/workers compares several workers with one.
"""

import copy

import pytest
import torch
from torch import nn

from job.cluster import comm
from job.engine import statistics
from job.engine.sync_norm import SynchronisedNorm, synchronise
from job.networks import build_resnet, with_features


def norms(channels, dimensions=2, **options):
    """Return a batch norm with random weights and statistics, and its synchronised copy."""
    torch.manual_seed(0)
    plain = (nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm1d)(channels, **options)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
    return plain, SynchronisedNorm(copy.deepcopy(plain), "layer")


def passed(norm, x, dy):
    """Return output, gradients of x and of the weights, and the state after a pass."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy)
    return [y, x.grad, *(value.grad for value in norm.parameters()), *norm.state_dict().values()]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("shape", "mean"),
    [((6, 5, 7, 3), 2.0), ((8, 5), 2.0), ((6, 5, 7, 3), 300.0)],
)
def test_sync_norm_equals_batch_norm(shape, mean, affine):
    plain, synchronised = norms(5, len(shape) - 2, affine=affine)
    x, dy = mean + torch.randn(shape), torch.randn(shape)
    for actual, expected in zip(passed(synchronised, x, dy), passed(plain, x, dy), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1, mean / 10))


def test_sync_norm_of_bfloat16_has_float32_statistics():
    plain, synchronised = norms(5)
    x, dy = 2 + torch.randn(6, 5, 7, 3).bfloat16(), torch.randn(6, 5, 7, 3).bfloat16()
    y, dx, *others = passed(synchronised, x, dy)
    expected_y, expected_dx, *expected = passed(plain, x, dy)
    assert y.dtype == dx.dtype == torch.bfloat16 and torch.equal(y, expected_y)
    torch.testing.assert_close(dx.float(), expected_dx.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(others, expected)


def test_sync_norm_gradients_equal_finite_differences():
    _, synchronised = norms(3)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(synchronised.double(), x)


def test_sync_norm_in_eval_mode_is_batch_norm(monkeypatch):
    monkeypatch.setattr(comm, "total", lambda *_: pytest.fail("a collective"))
    plain, synchronised = norms(5)
    x = torch.randn(6, 5, 7, 3)
    assert torch.equal(synchronised.eval()(x), plain.eval()(x))


def network():
    torch.manual_seed(0)
    return with_features(build_resnet("resnet18", stem="small", width=16), [3], "fc")


def test_synchronise_skips_one_worker():
    net = network()
    synchronise(net)
    assert not any(isinstance(module, SynchronisedNorm) for module in net.modules())


def test_synchronise_replaces_all_norms(monkeypatch):
    """Names in checkpoints stay, and all collectives have different names."""
    net, names = network(), []
    images = torch.rand(4, 3, 16, 16)
    monkeypatch.setattr(comm, "size", lambda: 2)
    monkeypatch.setattr(comm, "total", lambda tensor, name: names.append(name) or tensor.clone())
    plain = copy.deepcopy(net)
    synchronise(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    outputs = net(images)
    assert list(outputs) == ["layer3", "fc"]
    torch.testing.assert_close(outputs, plain(images))
    assert len(names) == len(set(names)) == 20
    forward = set(names)
    outputs["fc"].sum().backward()
    assert set(names) - forward == {f"{name}.backward" for name in forward} and len(names) == 40


def test_synchronise_replaces_norms_under_a_name(monkeypatch):
    monkeypatch.setattr(comm, "size", lambda: 2)
    net = network()
    synchronise(net, ("layer4.", "layer3.1.bn2"))
    replaced = {name for name, norm in net.named_modules() if isinstance(norm, SynchronisedNorm)}
    assert {name.rpartition(".")[0] for name in replaced} >= {
        "layer4.0",
        "layer4.1",
        "layer4.0.downsample",
        "layer3.1",
    }
    assert len(replaced) == 6


def test_own_statistics_exclude_synchronised_norms(monkeypatch):
    monkeypatch.setattr(comm, "size", lambda: 2)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(2)))
    assert [*statistics.own_statistics(net)][::2] == [
        "0.running_mean",
        "1.running_mean",
        "2.0.running_mean",
    ]
    synchronise(net, ("1",))
    own = ["0.running_mean", "0.running_var", "2.0.running_mean", "2.0.running_var"]
    assert [*statistics.own_statistics(net)] == own
    synchronise(net)
    rows = statistics.gather(net)
    assert rows.shape == (2, 0)
    statistics.load(net, rows[0])
