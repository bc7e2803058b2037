"""No framework: the student's step, its collectives, and errors."""

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
# Their last argument is a name.
SENDERS = ("begin_sum_", "total", "highest", "begin_gather", "begin_exchange", "broadcast")


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
    """Record the names of collectives."""
    names = []
    for sender in SENDERS:
        function = getattr(comm, sender)

        def record(*arguments, function=function):
            names.append(arguments[-1])
            return function(*arguments)

        monkeypatch.setattr(comm, sender, record)
    return names


def step(framework):
    """Return the output of a step on 4 images."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prepared = framework.prepare([(255 * images).byte()] * framework.views, START)
    output = framework.forward(MicroBatch(images, START, 0, 0), prepared)
    framework.after_update(prepared)
    framework.signs(output)
    return output


@pytest.mark.parametrize(("name", "views", "exchanges"), [("none", 1, False), ("moco", 2, True)])
def test_step_has_one_view_and_no_exchange(sent, name, views, exchanges):
    framework = new(name)
    assert framework.views == views
    step(framework)
    assert "collapse" in sent
    assert any(collective.startswith("moco.") for collective in sent) == exchanges


def test_module_is_the_student_without_head():
    framework = new("none")
    state = framework.module.state_dict()
    assert {name.split(".")[0] for name in state} == {"encoder_q"}
    assert not any(".fc." in name for name in state)


def test_last_stage_gives_all_gradients():
    framework = new("none")
    output = step(framework)
    assert list(output.features) == ["layer3", "layer4"] and (output.losses, output.metrics) == (
        {},
        {},
    )
    output.features["layer4"].square().sum().backward()
    assert all(value.grad is not None for value in framework.module.parameters())


def test_distil_adds_views():
    framework = new("none")
    framework.distil(2)
    assert (framework.views, framework.student_views, framework.distilled_views) == (2, 2, 2)
    first, second = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    output = framework.forward(MicroBatch(first, START, 0, 0, (second,)), None)
    [other] = output.others
    assert list(output.features) == list(other) == ["layer3", "layer4"]
    assert torch.equal(other["layer4"], framework.encoder(second)["layer4"])
    pooled = output.features["layer4"].relu().mean((2, 3))
    assert torch.allclose(output.embeddings, torch.nn.functional.normalize(pooled), atol=1e-6)


def test_embeddings_are_normalised_pooled_features():
    output = step(new("none"))
    pooled = output.features["layer4"].relu().mean((2, 3))
    assert torch.allclose(output.embeddings, pooled / pooled.norm(dim=1, keepdim=True), atol=1e-6)
    assert not output.embeddings.requires_grad


def test_checkpoint_backbone_is_read(tmp_path):
    """`job.linear`, k-NN and `job.export` read it so."""
    state = {f"module.{name}": value for name, value in new("none").module.state_dict().items()}
    torch.save({"state_dict": state, "arch": "resnet18"}, tmp_path / "saved.pth.tar")
    backbone = read_backbone(str(tmp_path / "saved.pth.tar"), "")
    assert (backbone.arch, backbone.stem, backbone.width) == ("resnet18", "small", 16)
    assert {f"module.encoder_q.{name}" for name in backbone.state} == state.keys()


def test_build_refuses_no_teacher():
    with pytest.raises(
        RunError,
        match="^--framework none: expected a --teacher, as nothing else trains the student",
    ) as caught:
        build(config(), None)
    assert caught.value.code == 2


def test_init_refuses_an_untrained_last_stage():
    """Otherwise the loop would wait for its gradients."""
    options = config(distill=["mgd", "gram"], mgd_stages=[1, 3], gram_stages=[3])
    message = refused(FRAMEWORKS["none"], options, [1, 3])
    assert message.startswith("--framework none: no distiller trains layer4; expected one")
    assert "Add 4 to --mgd-stages or --gram-stages, or choose another" in message


@pytest.mark.parametrize("teacher", ["", "t.pth"])
def test_resume_refuses_another_framework(teacher):
    """The other run may have no teacher, which `none` needs."""
    saved = dict.fromkeys(SAVED) | {"epoch": 1, "step": 0, "format": FORMAT}
    saved["config"] = dataclasses.asdict(config("moco", teacher=teacher))
    with pytest.raises(
        RunError,
        match="^--framework none: the checkpoint of epoch 1, step 0 has moco; expected the same",
    ) as caught:
        continues(saved, config(teacher="t.pth"), SimpleNamespace())
    assert caught.value.code == 2


def test_resume_of_old_checkpoint_is_moco():
    """It lacks some options, among them `distill`, whose default is a list."""
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
