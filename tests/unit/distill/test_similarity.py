"""Similarity: loss and gradients against a slow loop in float64, queue, and settings."""

import numpy as np
import pytest
import torch
from distillers import HEAD, B, S, T, array, build, by_image, check_gradient, features, unit

from job.config import read_config
from job.distill.momentum import MOMENTUM
from job.distill.similarity import SETTINGS

K, TEMPERATURES = 9, {"similarity_t": 0.3, "similarity_teacher_t": 0.1}
DIMS = {"seed": HEAD, "headless": T, "compress": T + S}
settings = pytest.mark.parametrize("setting", DIMS)
with_head = pytest.mark.parametrize("setting", ["seed", "headless"])


def new(setting, **options):
    return build("similarity", similarity=setting, similarity_k=K, **TEMPERATURES | options)


def theirs(seed):
    """Return features of the teacher and the momentum encoder."""
    generator = torch.Generator().manual_seed(100 + seed)
    return features(T, seed, HEAD) | {MOMENTUM: torch.rand(B, S, generator=generator)}


def through(head, vector):
    """Return the head's output for a vector."""
    if not head:
        return vector
    if "weight" in head:
        return head["weight"] @ vector + head["bias"]
    hidden = np.maximum(head["0.weight"] @ vector + head["0.bias"], 0)
    return head["2.weight"] @ hidden + head["2.bias"]


def probabilities(vector, others, temperature):
    exponents = np.array([vector @ other for other in others]) / temperature
    exponents = np.exp(exponents - exponents.max())
    return exponents / exponents.sum()


def slow_loss(head, queue, student, teacher):
    """Return the cross entropy, image by image. teacher: an embedding of each image.

    Without a head, the queue has T rows of the teacher, then the student's rows.
    """
    loss = 0.0
    for ours, theirs in zip(by_image(student), teacher, strict=True):
        s, t = unit(through(head, ours)), unit(theirs)
        of_teacher = [t, *queue.T] if head else [column[:T] for column in queue.T]
        of_student = of_teacher if head else [column[T:] for column in queue.T]
        expected = probabilities(t, of_teacher, TEMPERATURES["similarity_teacher_t"])
        actual = probabilities(s, of_student, TEMPERATURES["similarity_t"])
        loss -= sum(p * np.log(q) for p, q in zip(expected, actual, strict=True)) / B
    return loss


@settings
def test_loss_and_gradients_equal_slow_loop(setting):
    distiller = new(setting, head_width=11 * (setting == "seed"))
    student, teacher = features(S, 1), theirs(2)
    loss = distiller.loss(student, distiller.targets(teacher, None))
    loss.backward()
    queue, maps = array(distiller.module.queue), array(student["layer4"])
    embeddings = array(teacher["fc"]) if setting == "seed" else by_image(array(teacher["layer4"]))
    head = {name: array(value) for name, value in distiller.module.head.state_dict().items()}
    assert loss.item() == pytest.approx(slow_loss(head, queue, maps, embeddings), rel=1e-5)
    check_gradient(student["layer4"], lambda value: slow_loss(head, queue, value, embeddings))
    for name, value in distiller.module.head.named_parameters():
        check_gradient(
            value, lambda new, name=name: slow_loss(head | {name: new}, queue, maps, embeddings)
        )


@with_head
def test_least_loss_is_entropy_of_targets(setting, monkeypatch):
    """The student has the teacher's own embeddings, and equal temperatures."""
    distiller = new(setting, similarity_t=0.2, similarity_teacher_t=0.2)
    targets = distiller.targets(theirs(2), None)
    entropy = 0.0
    for t in array(targets):
        expected = probabilities(t, [t, *array(distiller.module.queue).T], 0.2)
        entropy -= (expected * np.log(expected)).sum() / B
    usual = distiller.loss(features(S, 1), targets).item()
    monkeypatch.setattr(distiller.module.head, "forward", lambda pooled: targets)
    assert distiller.loss(features(S, 1), targets).item() == pytest.approx(entropy, rel=1e-4)
    assert entropy < usual


@settings
def test_factor_divides_mean_over_images(setting):
    one, other = new(setting), new(setting, loss_factor=4.0)
    student, teacher = features(S, 1), theirs(2)
    loss = one.loss(student, one.targets(teacher, None)).item()
    assert other.loss(student, other.targets(teacher, None)).item() == pytest.approx(loss / 4)
    student, teacher = (
        {name: torch.cat([value] * 2) for name, value in each.items()}
        for each in (student, teacher)
    )
    assert one.loss(student, one.targets(teacher, None)).item() == pytest.approx(loss, rel=1e-5)


@settings
def test_queue_has_last_embeddings(setting):
    """It starts with random directions and wraps. The loss does not change it."""
    distiller = new(setting)
    queue = distiller.module.queue
    before = queue.clone()
    for queue_part in queue.split([T, S] if setting == "compress" else [DIMS[setting]]):
        assert torch.allclose(queue_part.norm(dim=0), torch.ones(K))
    seen = [distiller.targets(theirs(seed), None) for seed in range(3)]
    distiller.loss(features(S, 1), seen[0]).backward()
    assert torch.equal(queue, before)
    for targets in seen:
        distiller.after_update(distiller.to_gather(targets))
    last = torch.cat(seen)[-K:]
    first = 3 * B % K
    assert torch.equal(queue.roll(-first, 1).T, last) and distiller.module.queue_ptr.tolist() == [
        first
    ]
    state = distiller.module.state_dict()
    assert {"queue", "queue_ptr"} < state.keys()


@settings
def test_misfits_warn_of_long_queue(setting):
    """Warn if the queue is not shorter than the set."""
    distiller = new(setting)
    assert distiller.misfits(K + 1) == {}
    for images, fitting in ((K, 4), (1, 1)):
        [(id, sentence)] = distiller.misfits(images).items()
        assert id == "long_similarity_queue" and f"--similarity-k {fitting} or less" in sentence
        assert (
            f"--similarity-k {K}: the queue is not shorter than the set of {images} images"
            in sentence
        )


def test_two_queues_have_the_same_images():
    distiller = build("similarity", similarity="compress", similarity_k=B)
    teacher = theirs(2)
    distiller.after_update(distiller.to_gather(distiller.targets(teacher, None)))
    pooled, followers = by_image(array(teacher["layer4"])), array(teacher[MOMENTUM])
    for column, t, m in zip(array(distiller.module.queue).T, pooled, followers, strict=True):
        assert column[:T] == pytest.approx(unit(t), rel=1e-5)
        assert column[T:] == pytest.approx(unit(m), rel=1e-5)


def test_only_compress_has_momentum_encoder():
    momenta = {setting: new(setting).momentum(new(setting).config) for setting in DIMS}
    assert momenta == {"seed": None, "headless": None, "compress": 0.999}
    slow = new("compress", similarity_m=0.9)
    assert slow.momentum(slow.config) == 0.9
    assert list(new("compress").module.state_dict()) == ["factor", "queue", "queue_ptr"]
    assert not list(new("compress").module.parameters())


def test_settings_default_to_published_values():
    for setting, dim in DIMS.items():
        distiller, published = build("similarity", similarity=setting), SETTINGS[setting]
        assert distiller.module.queue.shape == (dim, published.k)
        assert (distiller.t, distiller.teacher_t) == (published.t, published.teacher_t)
        assert (new(setting).t, new(setting).teacher_t) == (0.3, 0.1)
    shapes = [
        tuple(value.shape)
        for value in build("similarity", similarity="seed").module.head.parameters()
    ]
    assert shapes == [(2048, S), (2048,), (HEAD, 2048), (HEAD,)]


def given(config):
    """Return the queue length and the temperatures of a run's options."""
    names = ("similarity", "similarity_k", "similarity_t", "similarity_teacher_t")
    distiller = build("similarity", **{name: getattr(config, name) for name in names})
    return distiller.module.queue.shape[1], distiller.t, distiller.teacher_t


@pytest.mark.parametrize("preset", ["compress", "seed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_overrides_values_of_preset(preset, setting):
    config = read_config(["DIR", "--config", preset, "--teacher", "t", "--similarity", setting])
    assert given(config) == SETTINGS[setting]


def test_preset_compress_is_published_recipe():
    config = read_config(["DIR", "--config", "compress"])
    assert (config.framework, config.distill) == ("none", ["similarity"])
    assert (config.lr, config.batch_size, config.epochs) == (0.01, 256, 130)
    assert (config.similarity, config.warmup_epochs) == ("compress", 0)
    assert config.schedule == [90, 120] and not config.cos and config.weight_decay == 1e-4
    assert config.weak_views and not config.aug_plus and config.crop_min == 0.08
    assert given(config) == (128000, 0.04, 0.04) and config.similarity_m == 0.999
    assert (config.loss_share, config.loss_factor) == (0, 1)


def test_preset_seed_is_published_recipe():
    config = read_config(["DIR", "--config", "seed"])
    assert (config.framework, config.distill, config.similarity) == ("none", ["similarity"], "seed")
    assert (config.lr, config.batch_size, config.epochs, config.warmup_epochs) == (
        0.03,
        256,
        200,
        5,
    )
    assert config.cos and config.aug_plus and not config.weak_views
    assert given(config) == (65536, 0.2, 0.01)
    assert (config.loss_share, config.loss_factor) == (0, 1)
