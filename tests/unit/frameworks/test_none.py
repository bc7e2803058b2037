"""Distillers only: what the student's step computes and sends, and what is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from errors import refused
from job.build import build
from job.checkpoints.folder import FORMAT
from job.checkpoints.foreign import read_backbone
from job.cluster import comm
from job.config import Config
from job.errors import RunError
from job.frameworks import FRAMEWORKS
from job.frameworks.base import MicroBatch
from job.position import Position
from job.resume import SAVED, continues

START = Position(0, 0)
SENDERS = (
    "begin_sum_",
    "total",
    "highest",
    "begin_gather",
    "begin_exchange",
    "broadcast",
)  # their last argument is a name


def config(framework="none", **options):
    return Config(
        framework=framework,
        arch="resnet18",
        stem="small",
        width=16,
        batch_size=4,
        moco_k=8,
        moco_dim=8,
        **options,
    )


def new(name):
    torch.manual_seed(0)
    return FRAMEWORKS[name](config(name), [3, 4])


@pytest.fixture
def sent(monkeypatch):
    """The names of the collectives so far."""
    names = []
    for sender in SENDERS:
        function = getattr(comm, sender)

        def record(*arguments, function=function):
            names.append(arguments[-1])
            return function(*arguments)

        monkeypatch.setattr(comm, sender, record)
    return names


def step(framework):
    """The output of a step on 4 images."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prepared = framework.prepare([(255 * images).byte()] * framework.views, START)
    output = framework.forward(MicroBatch(images, START, 0, 0), prepared)
    framework.after_update(prepared)
    framework.signs(output)
    return output


@pytest.mark.parametrize(("name", "views", "exchanges"), [("none", 1, False), ("moco", 2, True)])
def test_a_step_needs_one_view_and_exchanges_nothing(sent, name, views, exchanges):
    framework = new(name)
    assert framework.views == views
    step(framework)
    assert "collapse" in sent
    assert any(collective.startswith("moco.") for collective in sent) == exchanges


def test_the_student_is_all_that_is_trained_and_has_no_head():
    framework = new("none")
    state = framework.module.state_dict()
    assert {name.split(".")[0] for name in state} == {"encoder_q"}
    assert not any(".fc." in name for name in state)


def test_every_parameter_gets_a_gradient_of_the_last_stage():
    framework = new("none")
    output = step(framework)
    assert list(output.features) == ["layer3", "layer4"] and (output.losses, output.metrics) == (
        {},
        {},
    )
    output.features["layer4"].square().sum().backward()
    assert all(value.grad is not None for value in framework.module.parameters())


def test_as_many_views_pass_through_the_student_as_are_distilled():
    framework = new("none")
    framework.distil(2)
    assert (framework.views, framework.student_views, framework.distilled_views) == (2, 2, 2)
    first, second = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    output = framework.forward(MicroBatch(first, START, 0, 0, (second,)), None)
    [found] = output.others
    assert list(output.features) == list(found) == ["layer3", "layer4"]
    assert torch.equal(found["layer4"], framework.encoder(second)["layer4"])
    pooled = output.features["layer4"].relu().mean((2, 3))
    assert torch.allclose(output.embeddings, torch.nn.functional.normalize(pooled), atol=1e-6)


def test_embeddings_are_the_normalised_features_under_the_head():
    output = step(new("none"))
    pooled = output.features["layer4"].relu().mean((2, 3))
    assert torch.allclose(output.embeddings, pooled / pooled.norm(dim=1, keepdim=True), atol=1e-6)
    assert not output.embeddings.requires_grad


def test_a_checkpoint_s_backbone_is_read_whole(tmp_path):
    """As `job.linear`, k-NN and `job.export` read it."""
    state = {f"module.{name}": value for name, value in new("none").module.state_dict().items()}
    torch.save({"state_dict": state, "arch": "resnet18"}, tmp_path / "saved.pth.tar")
    found = read_backbone(str(tmp_path / "saved.pth.tar"), "")
    assert (found.arch, found.stem, found.width) == ("resnet18", "small", 16)
    assert {f"module.encoder_q.{name}" for name in found.state} == state.keys()


def test_without_a_teacher_nothing_would_train():
    with pytest.raises(
        RunError,
        match="^--framework none: expected a --teacher, as nothing else trains the student",
    ) as caught:
        build(config(), None)
    assert caught.value.code == 2


def test_a_last_stage_that_no_distiller_trains_is_refused():
    """The loop would wait for its gradients."""
    given = config(distill=["mgd", "gram"], mgd_stages=[1, 3], gram_stages=[3])
    message = refused(FRAMEWORKS["none"], given, [1, 3])
    assert message.startswith("--framework none: no distiller trains layer4; expected one")
    assert "Add 4 to --mgd-stages or --gram-stages, or choose another" in message


@pytest.mark.parametrize("teacher", ["", "t.pth"])
def test_a_run_of_another_framework_is_not_continued(teacher):
    """Also if that had no teacher, without which there is no run of this one."""
    saved = dict.fromkeys(SAVED) | {"epoch": 1, "step": 0, "format": FORMAT}
    saved["config"] = dataclasses.asdict(config("moco", teacher=teacher))
    with pytest.raises(
        RunError,
        match="^--framework none: the checkpoint of epoch 1, step 0 has moco; expected the same",
    ) as caught:
        continues(saved, config(teacher="t.pth"), SimpleNamespace())
    assert caught.value.code == 2


def test_a_checkpoint_from_before_frameworks_could_be_chosen_is_one_of_moco():
    """Of its options some are missing, `distill` among them, whose default is a list."""
    old = dataclasses.asdict(config("moco", teacher="t.pth"))
    for name in ("framework", "distill"):
        del old[name]
    saved = dict.fromkeys(SAVED) | {
        "epoch": 1,
        "step": 0,
        "format": FORMAT,
        "config": old,
        "workers": 1,
        "images": 8,
    }
    lines = []
    run = SimpleNamespace(size=1, log=SimpleNamespace(line=lines.append))
    assert continues(saved, config("moco", teacher="t.pth"), run) is saved and lines == []
