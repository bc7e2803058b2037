"""SimSiam as a framework: loss, views, names in checkpoints, rates, hints."""

import dataclasses
import math

import pytest
import torch
from errors import refused
from torch import nn
from torchvision import models

from job import build
from job.checkpoints.foreign import read_backbone
from job.cluster import comm
from job.config import Config
from job.frameworks import FRAMEWORKS
from job.frameworks.base import MicroBatch
from job.frameworks.simsiam import (
    COLLAPSED,
    LEARNT,
    STUCK,
    SimSiamFramework,
    build_predictor,
    build_projector,
)
from job.hints import PULL, STEPS, Expectation
from job.position import START

B = 6
SMALL = {"arch": "resnet18", "stem": "small", "width": 16, "dim": 24, "pred_dim": 8}
CONFIG = Config(framework="simsiam", batch_size=B, **SMALL)


def new(stages=(3, 4), **options):
    torch.manual_seed(0)
    return SimSiamFramework(dataclasses.replace(CONFIG, **options), list(stages))


def views():
    """Return two views, (2, B, 3, 16, 16), normalised."""
    return torch.randn(2, B, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def run(framework):
    first, second = views()
    return framework.forward(MicroBatch(first, START, 0, 0, (second,)), None)


def slow_loss(net, projector, predictor):
    """Return the loss, image by image and without torch's cosine."""
    z = [projector(torch.flatten(net.avgpool(net.layer4(body(net, view))), 1)) for view in views()]
    p = [predictor(each) for each in z]
    total = 0.0
    for ours, theirs in ((p[0], z[1]), (p[1], z[0])):
        for n in range(B):
            a, b = ours[n], theirs[n].detach()
            lengths = a.square().sum().sqrt() * b.square().sum().sqrt()
            total = total - (a * b).sum() / lengths / B / 2
    return total


def body(net, images):
    x = torch.relu(net.bn1(net.conv1(images)))
    return net.layer3(net.layer2(net.layer1(x)))


def test_loss_and_gradients_equal_plain_torch():
    """Compare with one network on both views, and with torch's gradients."""
    framework = new()
    net = framework.network()
    net.fc = build_projector(128, 128, 24)
    predictor = build_predictor(24, 8)
    net.load_state_dict(framework.encoder.state_dict())
    predictor.load_state_dict(framework.module.predictor.state_dict())
    expected = slow_loss(net, net.fc, predictor)
    expected.backward()
    loss = run(framework).losses["cosine"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    by_hand = {f"encoder.{name}": value.grad for name, value in net.named_parameters()}
    by_hand |= {f"predictor.{name}": value.grad for name, value in predictor.named_parameters()}
    for name, value in framework.module.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, by_hand[name], rtol=1e-3, atol=1e-5)
    assert not framework.module.encoder.get_parameter("fc.6.bias").requires_grad
    buffers = dict(net.named_buffers())
    for name, value in framework.encoder.named_buffers():
        torch.testing.assert_close(value, buffers[name])
    assert buffers["bn1.num_batches_tracked"] == 2


def test_output_is_as_declared():
    framework = new()
    output = run(framework)
    assert tuple(output.losses) == framework.losses and tuple(output.metrics) == framework.metrics
    assert output.embeddings.norm(dim=1).tolist() == pytest.approx([1] * B)
    assert not output.embeddings.requires_grad
    assert 0.9 < framework.signs(output)["feature_std"] < 1.2
    assert framework.reference == 1.0 and (framework.views, framework.student_views) == (2, 2)


@pytest.mark.parametrize("mgd_views", [1, 2])
def test_features_are_of_the_distilled_views(mgd_views):
    framework = new(mgd_views=mgd_views)
    framework.distil(3 - mgd_views)  # --mgd-views decides
    output = run(framework)
    features_of_views = [output.features, *output.others]
    assert framework.distilled_views == len(features_of_views) == mgd_views
    again = new()
    for view, features in zip(views(), features_of_views, strict=False):
        assert (
            list(features) == ["layer3", "layer4", "fc"]
            and features["fc"].shape[1] == framework.head_dim
        )
        assert torch.equal(features["layer4"], again.encoder(view)["layer4"])


def released(arch, dim, hidden):
    """Return the tensors of a released file: torchvision's network, projector, predictor."""
    net = getattr(models, arch)(num_classes=dim, zero_init_residual=True)
    width = net.fc.in_features
    first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
    layers = [first, nn.BatchNorm1d(width), nn.ReLU(), second, nn.BatchNorm1d(width), nn.ReLU()]
    net.fc = nn.Sequential(*layers, net.fc, nn.BatchNorm1d(dim, affine=False))
    predictor = [
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim),
    ]
    both = nn.ModuleDict({"encoder": net, "predictor": nn.Sequential(*predictor)})
    return {f"module.{name}": value for name, value in both.state_dict().items()}


def test_checkpoint_has_the_released_names():
    """Other programs' tools can read it, and this program loads a released file."""
    framework = new(stem="imagenet", width=64, dim=32)
    state, theirs = framework.module.state_dict(), released("resnet18", 32, 8)
    assert {f"module.{name}": value.shape for name, value in state.items()} == {
        name: value.shape for name, value in theirs.items()
    }
    bare = {name.removeprefix("module."): value for name, value in theirs.items()}
    framework.module.load_state_dict(bare)
    bias = framework.encoder.get_parameter("fc.6.bias")
    assert torch.equal(bias, bare["encoder.fc.6.bias"])


@pytest.mark.parametrize("program", ["this one", "the released one"])
def test_checkpoint_backbone_and_projector_are_read(tmp_path, program):
    """--teacher, `job.linear`, k-NN and `job.export` read it so."""
    if program == "this one":
        state = {f"module.{name}": value for name, value in new().module.state_dict().items()}
        head, stem, width = "mlp 128-128-128-24", "small", 16
    else:
        state, head, stem, width = released("resnet18", 32, 8), "mlp 512-512-512-32", "imagenet", 64
    content = {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    torch.save(content, tmp_path / "saved.pth.tar")
    backbone = read_backbone(str(tmp_path / "saved.pth.tar"))
    assert (backbone.arch, backbone.stem, backbone.width) == ("resnet18", stem, width)
    assert backbone.head == head
    ours = {f"module.encoder.{name}": value for name, value in backbone.state.items()}
    heads = ("module.encoder.fc.", "module.predictor.")
    assert ours.keys() == {name for name in state if not name.startswith(heads)}
    assert all(torch.equal(value, state[name]) for name, value in ours.items())


def test_student_is_the_encoder_without_projector():
    framework = new()
    student, state = framework.student().state_dict(), framework.encoder.state_dict()
    body = {name for name in state if not name.startswith("fc.")}
    assert body == {name for name in student if not name.startswith("fc.")}
    assert all(torch.equal(student[name], state[name]) for name in body)


def test_head_width_widens_the_projector():
    state = new(head_width=40).module.state_dict()
    shapes = [tuple(state[f"encoder.fc.{layer}.weight"].shape) for layer in (0, 3, 6)]
    assert shapes == [(40, 128), (40, 40), (24, 40)]


@pytest.mark.parametrize("fixed", [False, True])
def test_fix_pred_lr_makes_a_group(fixed):
    """Without the option, one group has all parameters, as with MoCo."""
    framework = new(fix_pred_lr=fixed)
    parameters = [value for value in framework.module.parameters() if value.requires_grad]
    groups = build.parameter_groups(parameters, framework.constant_rate())
    predictor = list(framework.module.predictor.parameters())
    assert [group.get("fix_lr", False) for group in groups] == ([False, True] if fixed else [False])
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    if fixed:
        assert list(map(id, groups[1]["params"])) == list(map(id, predictor))


def test_init_refuses_compiled_collectives(monkeypatch):
    monkeypatch.setattr(comm, "size", lambda: 2)
    message = refused(new, compile=True, sync_bn="heads")
    assert message.startswith("--compile: --sync-bn heads over 2 workers needs collectives")
    assert "expected --sync-bn none" in message
    new(compile=True, sync_bn="none")


@pytest.fixture
def expectation(monkeypatch):
    """A function that makes SimSiam's Expectation without its networks."""

    def make(workers=2, **options):
        monkeypatch.setattr(comm, "size", lambda: workers)
        framework = object.__new__(SimSiamFramework)
        framework.config = dataclasses.replace(CONFIG, **options)
        return Expectation(framework.config, framework, 1000)

    return make


def steps(first=0, **more):
    usual = {"epoch": 0, "cosine": -0.5, "distillation": 1.0, "data_wait": 0.1}
    return [usual | {"steps": first + step + 1} | more for step in range(STEPS)]


@pytest.mark.parametrize(
    ("id", "name", "bound", "options", "text"),
    [
        ("collapsed", "cosine", COLLAPSED, {}, "probably collapsed"),
        ("stuck", "cosine", STUCK, {"epoch": 3, "first": LEARNT}, "that of unrelated vectors"),
        ("pull", "distillation", PULL, {}, "times the range of the cosine loss: "),
    ],
)
def test_hint_appears_beyond_its_bound(
    expectation,
    id,
    name,
    bound,
    options,
    text,
):
    records = [steps(**options | {name: factor * bound}) for factor in (0.99, 1.01)]
    hints = [expectation(teacher="t").hints(each) for each in records]
    none, one = sorted(hints, key=len)
    assert none == {} and list(one) == [id] and text in one[id]


def test_hint_is_absent_at_a_healthy_end(expectation):
    """Distillation as strong as at the start gives no hint either."""
    some = expectation(teacher="t")
    assert some.hints(steps(cosine=-0.99, distillation=10.0, epoch=9, first=900)) == {}


@pytest.mark.parametrize(
    ("first", "epoch", "warmup_epochs", "hinted"),
    [
        (0, 9, 0, False),
        (LEARNT, 0, 0, False),
        (LEARNT, 1, 0, True),
        (LEARNT, 2, 3, False),
    ],
)
def test_hint_waits_for_first_steps_and_warm_up(
    expectation,
    first,
    epoch,
    warmup_epochs,
    hinted,
):
    records = steps(first, epoch=epoch, cosine=0.0)
    hints = expectation(warmup_epochs=warmup_epochs).hints(records)
    assert list(hints) == ["stuck"] * hinted


@pytest.mark.parametrize(
    ("sync_bn", "workers", "warned"),
    [("none", 2, 1), ("none", 1, 0), ("all", 2, 0), ("heads", 2, 0)],
)
def test_warning_of_unsynchronised_norms(expectation, sync_bn, workers, warned):
    assert len(expectation(workers, sync_bn=sync_bn).warnings()) == warned


def test_warning_counts_images_of_a_micro_batch(expectation):
    options = {"sync_bn": "none", "batch_size": 64, "accumulate": 4}
    [sentence] = expectation(**options).warnings().values()
    assert "the statistics of only 8 images of its worker" in sentence


def test_loss_share_is_of_the_loss_range(expectation):
    lines = expectation(teacher="t", loss_share=0.5).lines()
    expected = "begins near 0.5, --loss-share 0.5 of the range of the cosine loss"
    assert any(expected in line for line in lines)


def test_registry_has_simsiam():
    assert FRAMEWORKS["simsiam"] is SimSiamFramework
    assert math.isclose(new().reference, 1.0)
