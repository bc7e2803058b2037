"""What a run is built of, and what it refuses."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from errors import refused
from runs import Kept, errors_of, of_kind, write_teacher

from job import build
from job.config import Config
from job.distill import mgd
from job.errors import RunError
from job.position import Position
from job.training import CHECKPOINT, Training
from mgd.distiller import MGDistiller

SMALL = "-a resnet18 --image-size 32 --epochs 2 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos -j 0".split()
SMALL += "--warmup-epochs 1 --save-every 2steps".split()


@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_random_matchings_follow_from_the_seed_and_take_no_teacher_channel_twice(reducer):
    def drawn(seed):
        whole = object.__new__(mgd.MGD)  # whose teacher has such widths
        whole.module = distiller = MGDistiller({2: (3, 10), 3: (4, 40), 4: (4, 40)}, reducer)
        shapes = {stage: distiller.matching(stage).shape for stage in distiller.stages}
        mgd.draw_matchings(whole, seed)
        found = {stage: distiller.matching(stage) for stage in distiller.stages}
        assert {stage: matching.shape for stage, matching in found.items()} == shapes
        return {stage: matching.flatten().tolist() for stage, matching in found.items()}

    for stage, T in ((2, 10), (3, 40), (4, 40)):
        assert len(set(drawn(0)[stage])) == len(drawn(0)[stage]) and set(drawn(0)[stage]) <= set(
            range(T)
        )
    assert drawn(0) == drawn(0)
    assert drawn(0)[3] != drawn(0)[4] and all(
        drawn(0)[stage] != drawn(1)[stage] for stage in (2, 3, 4)
    )
    assert (
        any(max(drawn(seed)[2]) == 9 for seed in range(9)) or reducer == "sm"
    )  # the last teacher channel has its chance too


def test_the_network_is_built_on_all_workers_before_anything_else():
    run = MagicMock()
    run.build.side_effect = RunError("rank 1 on b: timm is not installed")
    config = Config(data="DIR", arch="own_network:Small")
    assert refused(build.build, config, run) == "rank 1 on b: timm is not installed"
    assert [call[0] for call in run.mock_calls] == ["build"]


def test_without_a_compiler_there_is_no_compiling(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        RunError, match=r"^--compile: missing; expected a C\+\+ compiler\. Install it"
    ) as caught:
        build.compile_networks(SimpleNamespace(total=lambda **values: values))
    assert caught.value.code == 2


CLASHES = {  # framework, losses, metrics, distiller: the name that two have
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
def test_a_name_that_is_taken_ends_a_run_at_its_start(monkeypatch, names):
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


def test_a_distiller_can_have_the_name_of_a_framework():
    framework = SimpleNamespace(name="toy", losses=("colour",), metrics=())
    build.check_names(framework, [SimpleNamespace(name="toy")])


def test_all_parts_of_a_checkpoint_are_listed():
    """`mgd` is one of each checkpoint, also without a teacher."""
    names = ("run", "images", "val", "framework", "trained", "gradients", "optimizer")
    parts = {name: MagicMock() for name in names}
    distillation = SimpleNamespace(modules=lambda: {"new": MagicMock()}, digest="abc")
    training = Training(Config(), distillation=distillation, **parts)
    assert training.content(Position(1, 0), None).keys() | {"format", "version"} == CHECKPOINT | {
        "mgd",
        "new",
    }


SHARED = {"distill": ["disco"], "teacher": "t"}


@pytest.mark.parametrize(
    "options",
    [SHARED, SHARED | {"distill": ["disco", "mgd"]}],
    ids=str,
)
def test_a_head_s_width_is_a_warning_if_disco_has_the_linear_head_of_moco(options):
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
def test_batches_without_equal_parts_are_refused(images, tmp_path):
    command = [*SMALL, images, "--batch-size", 8, "--out", tmp_path / "run", "--accumulate"]
    uneven, single = errors_of("job.train", [[*command, 3], [*command, 8]])
    assert (
        "--accumulate 3: cannot divide a worker's batch of 8 images; expected a divisor" in uneven
    )
    assert (
        "--batch-size 8: one image for each of 8 micro-batches" in single
        and "expected 16 or more" in single
    )
    assert not (tmp_path / "run").exists()


NARROW = "--config small --stem small --width 16 -a resnet18 -j 0 --moco-k 20".split()


@pytest.mark.slow
def test_options_that_fit_no_network_are_refused_before_a_file_is_written(images, tmp_path):
    """Positions too few for gram."""
    teacher = write_teacher(tmp_path / "teacher", "resnet18", stem="small", width=16)
    command = [images, *NARROW, "--image-size", 8, "--teacher", teacher, "--out", tmp_path / "run"]
    [positions] = errors_of("job.train", [[*command, "--distill", "gram"]])
    assert "--gram-stages 1 2 3 4: the maps of layer4 have 1 x 1 positions" in positions
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_a_head_s_width_that_has_no_effect_resumes_with_a_warning(images, tmp_path):
    """Its head is linear and disco's too. Another width is refused, so the same must be taken."""
    teacher = write_teacher(tmp_path / "teacher", "resnet18", stem="small", width=16)
    command = [images, *NARROW, "--image-size", 16, "--teacher", teacher, "--out", tmp_path / "run"]
    command += ["--batch-size", 8, "--distill", "disco", "--no-mlp", "--head-width", 9]
    command += ["--resume", "auto", "--epochs"]
    for epochs in (1, 2):
        words = [sys.executable, "-m", "job.train", *map(str, command), str(epochs)]
        subprocess.run(words, check=True, capture_output=True, timeout=300)
    found = [record["id"] for record in of_kind(tmp_path / "run", "warning")]
    assert found.count("unused_head_width") == 2
    assert len(of_kind(tmp_path / "run", "resumed")) == 1
