"""MoCo as a framework: reference loss, outputs, metrics and views."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from job.config import Config
from job.data.augment import normalize
from job.frameworks.base import MicroBatch
from job.frameworks.moco import MoCoFramework
from job.position import Position

K = 30
CONFIG = Config(arch="resnet18", stem="small", width=16, batch_size=6, moco_k=K, moco_dim=8)
START = Position(0, 0)


@pytest.fixture
def framework():
    torch.manual_seed(0)
    return MoCoFramework(CONFIG, [4])


def views(seed=0):
    """Return two equal views of 6 images, 2 x (6, 3, 16, 16) uint8."""
    images = torch.randint(
        0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return [images, images]


def run(framework, seed=0):
    """Return the output of a step."""
    images = views(seed)
    prepared = framework.prepare(images, START)
    output = framework.forward(MicroBatch(normalize(images[0]), START, 0, 0), prepared)
    framework.after_update(prepared)
    return output


def test_reference_is_the_loss_of_guessing(framework):
    """It is the loss of K + 1 equal logits."""
    assert framework.reference == pytest.approx(math.log(K + 1))
    guess = F.cross_entropy(torch.zeros(1, K + 1), torch.zeros(1, dtype=torch.long))
    assert framework.reference == pytest.approx(guess.item())


def test_accuracy_is_a_sum_of_percents(framework):
    """With equal views and weights, and no shuffle, each query is nearest to its own key."""
    output = run(framework)
    assert output.metrics["accuracy"].item() == 100 * 6
    assert (
        framework.describe({"accuracy": output.metrics["accuracy"].item() / 6})
        == "contrast accuracy 100.0 %"
    )
    framework.module.queue[:] = -framework.module.queue
    framework.module.queue[:, :6] = output.embeddings.T.neg()
    with torch.no_grad():
        framework.module.encoder_k.fc.weight.neg_()
        framework.module.encoder_k.fc.bias.neg_()
    assert run(framework).metrics["accuracy"].item() == 0


def test_head_width_widens_both_heads():
    framework = MoCoFramework(dataclasses.replace(CONFIG, mlp=True, head_width=40), [4])
    state = framework.module.state_dict()
    for encoder in ("encoder_q", "encoder_k"):
        shapes = [tuple(state[f"{encoder}.fc.{layer}.weight"].shape) for layer in (0, 2)]
        assert shapes == [(40, 128), (8, 40)]
    assert run(framework).embeddings.shape == (6, 8)


def test_output_is_as_declared(framework):
    output = run(framework)
    assert tuple(output.losses) == framework.losses and tuple(output.metrics) == framework.metrics
    assert list(output.features) == ["layer4", "fc"] and output.others == ()
    assert (
        output.features["fc"].shape == (6, framework.head_dim)
        and output.features["fc"].requires_grad
    )
    assert set(framework.signs(output)) == {"feature_std", "dead_layer4", "queue_rank"}
    assert (
        output.embeddings.norm(dim=1).tolist() == pytest.approx([1] * 6)
        and not output.embeddings.requires_grad
    )


def test_distil_adds_the_key_view(framework):
    """It has a gradient. The contrastive loss is still of the first view."""
    framework.distil(2)
    assert (framework.views, framework.student_views, framework.distilled_views) == (2, 2, 2)
    first, second = (normalize(views(seed)[0]) for seed in (0, 1))
    prepared = framework.prepare([views(0)[0], views(1)[0]], START)
    output = framework.forward(MicroBatch(first, START, 0, 0, (second,)), prepared)
    expected = framework.encoder(second)
    [other] = output.others
    assert all(torch.allclose(other[name], expected[name], atol=1e-5) for name in ("layer4", "fc"))
    assert other["fc"].requires_grad
    torch.manual_seed(0)
    one_view = MoCoFramework(CONFIG, [4])
    prepared = one_view.prepare([views(0)[0], views(1)[0]], START)
    one = one_view.forward(MicroBatch(first, START, 0, 0), prepared)
    assert torch.equal(one.losses["contrastive"], output.losses["contrastive"])


def test_after_update_enqueues_the_keys(framework):
    before = framework.module.queue.clone()
    run(framework)
    changed = (framework.module.queue != before).any(0)
    assert changed.tolist() == [True] * 6 + [False] * (K - 6)
