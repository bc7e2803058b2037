"""The networks and the state of a run, and errors before its start."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from errors import refused
from runs import Kept, errors_of, of_kind, write_teacher
from torch import nn

from job import build
from job.cluster import objects
from job.config import Config
from job.distill import mgd
from job.errors import RunError
from job.position import Position
from job.training import CHECKPOINT, Training
from mgd.distiller import MGDistiller

SMALL = "-a resnet18 --image-size 32 --epochs 2 --moco-k 20 --mlp --moco-t 0.2".split()
SMALL += "--aug-plus --cos -j 0 --warmup-epochs 1 --save-every 2steps".split()


@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_draw_matchings_follows_the_seed(reducer):
    """A teacher channel appears once at most."""

    def drawn(seed):
        distillation = object.__new__(mgd.MGD)
        distillation.module = module = MGDistiller({2: (3, 10), 3: (4, 40), 4: (4, 40)}, reducer)
        shapes = {stage: module.matching(stage).shape for stage in module.stages}
        mgd.draw_matchings(distillation, seed)
        matchings = {stage: module.matching(stage) for stage in module.stages}
        assert {stage: matching.shape for stage, matching in matchings.items()} == shapes
        return {stage: matching.flatten().tolist() for stage, matching in matchings.items()}

    first, other = drawn(0), drawn(1)
    for stage, T in ((2, 10), (3, 40), (4, 40)):
        assert len(set(first[stage])) == len(first[stage]) and set(first[stage]) <= set(range(T))
        assert first[stage] != other[stage]
    assert first == drawn(0) and first[3] != first[4]
    # The last teacher channel can appear too.
    assert any(max(drawn(seed)[2]) == 9 for seed in range(9)) or reducer == "sm"


def test_build_starts_with_the_network_on_all_workers():
    run = MagicMock()
    run.build.side_effect = RunError("rank 1 on b: timm is not installed")
    config = Config(data="DIR", arch="own_network:Small")
    assert refused(build.build, config, run) == "rank 1 on b: timm is not installed"
    assert [call[0] for call in run.mock_calls] == ["build"]


def test_compile_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    problem = r"^--compile: missing; expected a C\+\+ compiler\. Install it"
    with pytest.raises(RunError, match=problem) as caught:
        build.compile_networks(SimpleNamespace(total=lambda **values: values))
    assert caught.value.code == 2


# Names of a framework, losses, metrics and a distiller: the clash.
CLASHES = {
    ("new", ("loss",), (), "other"): "numbers of a step have the name 'loss'",
    ("new", (), ("stop",), "other"): "numbers of a step have the name 'stop'",
    ("new", (), ("lr",), "other"): "numbers of a step have the name 'lr'",
    ("new", ("a",), ("a",), "other"): "numbers of a step have the name 'a'",
    ("new", ("a",), (), "a"): "numbers of a step have the name 'a'",
    ("new", (), (), "optimizer"): "parts of a checkpoint have the name 'optimizer'",
    ("new", (), (), "format"): "parts of a checkpoint have the name 'format'",
    ("new", (), (), "momentum_encoder"): "parts of a checkpoint have the name 'momentum_encoder'",
    ("distillers", (), (), "other"): "trained modules have the name 'distillers'",
}


@pytest.mark.parametrize("names", CLASHES)
def test_names_must_not_clash(monkeypatch, names):
    framework, losses, metrics, distiller = names
    monkeypatch.setattr(build, "find_images", lambda *_: SimpleNamespace(lines=[]))
    new = SimpleNamespace(name=framework, losses=losses, metrics=metrics)
    monkeypatch.setitem(build.FRAMEWORKS, framework, lambda *_: new)
    kind = SimpleNamespace(name=distiller, stages=lambda _: [4])
    monkeypatch.setitem(build.DISTILLERS, distiller, kind)
    config = Config(framework=framework, distill=[distiller], teacher="t.pth")
    message = refused(build.build, config, None)
    shown = f"--framework {framework} --distill {distiller}: two {CLASHES[names]}; expected"
    assert message.startswith(shown)


def test_distiller_can_have_the_name_of_a_framework():
    framework = SimpleNamespace(name="toy", losses=("colour",), metrics=())
    build.check_names(framework, [SimpleNamespace(name="toy")])


def test_checkpoint_lists_all_keys():
    """Every checkpoint has `mgd`, even without a teacher."""
    names = ("run", "images", "val", "framework", "trained", "gradients", "optimizer")
    mocks = {name: MagicMock() for name in names}
    distillation = SimpleNamespace(modules=lambda: {"new": MagicMock()}, digest="abc")
    training = Training(Config(), distillation=distillation, **mocks)
    keys = training.content(Position(1, 0), None).keys() | {"format", "version"}
    assert keys == CHECKPOINT | {"mgd", "new"}


DISCO = {"distill": ["disco"], "teacher": "t"}


@pytest.mark.parametrize("options", [DISCO, DISCO | {"distill": ["disco", "mgd"]}], ids=str)
def test_head_width_without_hidden_layer_warns(options):
    """disco has the head of MoCo, which is linear here."""

    def warned(dims, **more):
        log = Kept()
        build.warn_of_head_width(Config(**options | more), dims, log)
        return log.records

    [record] = warned((128, 128), head_width=9)
    assert (record["kind"], record["id"]) == ("warning", "unused_head_width")
    text = "--head-width 9: no effect without a head that has a hidden layer; leave it out, "
    assert record["text"] == f"{text}or add --mlp, in a new run"
    assert not warned((128, 64), head_width=9) and not warned((128, 128))
    for more in ({"mlp": True}, {"framework": "simsiam"}, {"distill": ["disco", "simreg"]}):
        assert not warned((128, 128), head_width=9, **more)


@pytest.mark.slow
def test_accumulate_must_divide_the_batch(images, tmp_path):
    command = [*SMALL, images, "--batch-size", 8, "--out", tmp_path / "run", "--accumulate"]
    uneven, single = errors_of("job.train", [[*command, 3], [*command, 8]])
    problem = "--accumulate 3: cannot divide a worker's batch of 8 images; expected a divisor"
    assert problem in uneven
    assert "--batch-size 8: one image for each of 8 micro-batches" in single
    assert "expected 16 or more" in single
    assert not (tmp_path / "run").exists()


NARROW = "--config small --stem small --width 16 -a resnet18 -j 0 --moco-k 20".split()


@pytest.mark.slow
@pytest.mark.short
def test_options_are_checked_before_a_file_is_written(images, tmp_path):
    """The maps have too few positions for gram."""
    teacher = write_teacher(tmp_path / "teacher", "resnet18", stem="small", width=16)
    command = [images, *NARROW, "--image-size", 8, "--teacher", teacher, "--out", tmp_path / "run"]
    [positions] = errors_of("job.train", [[*command, "--distill", "gram"]])
    assert "--gram-stages 1 2 3 4: the maps of layer4 have 1 x 1 positions" in positions
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_head_width_without_effect_warns_on_resume(images, tmp_path):
    """A resume refuses another width, so it must accept the same one."""
    teacher = write_teacher(tmp_path / "teacher", "resnet18", stem="small", width=16)
    command = [images, *NARROW, "--image-size", 16, "--teacher", teacher, "--out", tmp_path / "run"]
    command += ["--batch-size", 8, "--distill", "disco", "--no-mlp", "--head-width", 9]
    command += ["--resume", "auto", "--epochs"]
    for epochs in (1, 2):
        train = [sys.executable, "-m", "job.train", *map(str, command), str(epochs)]
        subprocess.run(train, check=True, capture_output=True, timeout=300)
    warnings = [record["id"] for record in of_kind(tmp_path / "run", "warning")]
    assert warnings.count("unused_head_width") == 2
    assert len(of_kind(tmp_path / "run", "resumed")) == 1


@pytest.mark.parametrize("same", [True, False])
def test_layouts_are_the_same_on_all_workers(monkeypatch, same):
    """Otherwise sums of gradients would mix values."""
    net = nn.Conv2d(2, 3, 3)
    strides = [value.stride() for value in net.parameters()]
    monkeypatch.setattr(objects, "allgather", lambda own, name: [("a", strides), ("b", own[1])])
    if same:
        build.check_layouts("mine:Net", net)
    else:
        message = refused(
            build.check_layouts, "mine:Net", net.to(memory_format=torch.channels_last)
        )
        assert message.startswith("--arch mine:Net: its weights have another layout on b than on a")
