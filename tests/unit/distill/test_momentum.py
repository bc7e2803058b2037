"""The momentum encoder: its start, its updates, and its use by distillers and checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from job.checkpoints.foreign import read_backbone
from job.config import Config
from job.distill.base import Distiller, Networks
from job.distill.distillation import Distillation
from job.distill.momentum import MOMENTUM, MomentumEncoder
from job.distill.pooled import pooled
from job.frameworks import FRAMEWORKS
from job.frameworks.base import MicroBatch
from job.position import START

SMALL = {"arch": "resnet18", "stem": "small", "width": 16, "batch_size": 4, "mlp": True}
SMALL |= {"moco_k": 8, "moco_dim": 8, "dim": 8, "pred_dim": 4, "zero_init_residual": True}
each = pytest.mark.parametrize("name", FRAMEWORKS)


def new(name="none"):
    torch.manual_seed(0)
    return FRAMEWORKS[name](Config(framework=name, **SMALL), [2, 4])


def images(seed=1):
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def disturb(net):
    """Change each parameter, like a step of the optimizer."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in net.parameters():
            value += torch.randn(value.shape, generator=generator)


@each
def test_encoder_starts_as_student_without_head(name):
    """It is in train mode, so it uses the images' statistics. Its running statistics follow."""
    framework = new(name)
    encoder = MomentumEncoder(framework, 0.9)
    student = framework.encoder.state_dict()
    state = encoder.module.state_dict()
    assert list(state) == [key for key in student if not key.startswith("fc.")]
    assert all(torch.equal(value, student[key]) for key, value in state.items())
    assert not any(value.requires_grad for value in encoder.module.parameters())
    actual = encoder.pooled(images())
    torch.testing.assert_close(actual, pooled(framework.encoder(images())).detach())
    assert not actual.requires_grad
    torch.testing.assert_close(dict(state), {key: student[key] for key in state})
    assert state["bn1.num_batches_tracked"] == 1


@each
def test_parameters_follow_student(name):
    """The expected values are computed in float64. Running statistics do not follow."""
    framework = new(name)
    encoder = MomentumEncoder(framework, 0.9)
    encoder.pooled(images())
    followed = {key: value.clone().double() for key, value in encoder.module.state_dict().items()}
    parameters = {key for key, _ in encoder.module.named_parameters()}
    for _ in range(3):
        disturb(framework.encoder)
        encoder.update()
        student = framework.encoder.state_dict()
        for key in parameters:
            followed[key] = 0.9 * followed[key] + 0.1 * student[key].double()
    for key, value in encoder.module.state_dict().items():
        torch.testing.assert_close(value.double(), followed[key], rtol=1e-5, atol=1e-5)


def test_student_does_not_change():
    framework = new()
    encoder = MomentumEncoder(framework, 0.9)
    student = framework.encoder.state_dict()
    before = {key: value.clone() for key, value in student.items()}
    disturb(encoder.module)
    encoder.pooled(images())
    encoder.update()
    assert all(torch.equal(before[key], value) for key, value in student.items())


class Keeper(Distiller):
    """Keep the features for `targets`. Its momentum is in its config's `momenta`."""

    def __init__(self, config, name):
        super().__init__(config, {}, None)
        self.name, self.got = name, []

    def momentum(self, config):
        return config.momenta.get(self.name)

    def targets(self, teacher, generator):
        self.got.append(teacher)
        return teacher


def together(momenta, views=1):
    """Return two distillers, `one` and `two`, of a student without a framework."""
    config = SimpleNamespace(momenta=momenta, loss_factor=1.0, seed=0)
    framework = new()
    framework.distil(views)
    teacher = SimpleNamespace(features=lambda images, indices: {"layer4": images})
    distillers = [Keeper(config, name) for name in ("one", "two")]
    return Distillation(config, Networks(None, None, framework, teacher), distillers)


def test_distillers_use_one_encoder():
    """The one with the highest momentum. It runs once a view, and is updated once a step."""
    both = together({"one": 0.5, "two": 0.75}, views=2)
    assert both.momentum.m == 0.75
    assert both.modules() == {
        "one": both.distillers[0].module,
        "two": both.distillers[1].module,
        MOMENTUM: both.momentum.module,
    }
    both.targets(MicroBatch(images(1), START, 0, 0, (images(2),)))
    assert both.momentum.module.state_dict()["bn1.num_batches_tracked"] == 2
    one, two = (distiller.got for distiller in both.distillers)
    assert all(first is second for first, second in zip(one, two, strict=True))
    for seed, features in enumerate(one, 1):
        assert torch.equal(features["layer4"], images(seed))
        torch.testing.assert_close(features[MOMENTUM], both.momentum.pooled(images(seed)))
    weight = both.momentum.module.conv1.weight
    before, student = weight.clone(), both.networks.framework.encoder.conv1.weight
    disturb(both.networks.framework.encoder)
    both.after_update()
    torch.testing.assert_close(weight, 0.75 * before + 0.25 * student.detach())


def test_encoder_is_built_only_if_needed():
    both = together({})
    assert both.momentum is None and list(both.modules()) == ["one", "two"]
    both.targets(MicroBatch(images(), START, 0, 0))
    assert [list(features) for features in both.distillers[0].got] == [["layer4"]]
    both.after_update()


@each
def test_read_backbone_reads_student(name, tmp_path):
    """The student may have a head. job.linear, job.export and --teacher read it like this."""
    framework = new(name)
    encoder = MomentumEncoder(framework, 0.9)
    disturb(encoder.module)
    state = {f"module.{key}": value for key, value in framework.module.state_dict().items()}
    content = {MOMENTUM: encoder.module.state_dict(), "state_dict": state, "arch": "resnet18"}
    torch.save(content, tmp_path / "saved.pth.tar")
    actual = read_backbone(str(tmp_path / "saved.pth.tar"), "resnet18")
    student = framework.encoder.state_dict()
    assert all(torch.equal(value, student[key]) for key, value in actual.state.items())
