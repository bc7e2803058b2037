"""Resume: the checkpoint, the options that can differ, and the restored state."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from disks import mount, unmount
from errors import refused
from job.config import Config, LinearConfig
from job.data.images import Images, Names
from job.evaluate import classifier
from job.engine.resume import (
    check_folder,
    load_optimizer,
    log_changes,
    warn_of_rate,
)
from job.resume import SAVED, continues, find, fixed, restore
from job.checkpoints.folder import FORMAT, Checkpoints
from job.distill.mgd import MGD
from job.distill.similarity import SETTINGS
from mgd.distiller import MGDistiller
from runs import Kept


class StandIn:
    """The fields of a Run that a resume needs, on one worker."""

    def __init__(self, folder, size=2):
        self.folder, self.size = str(folder), size
        self.log, self.checkpoints = Kept(), Checkpoints(str(folder), 3)
        self.bad_images = set()

    def on_first(self, work):
        return work()


@pytest.fixture
def run(tmp_path):
    return StandIn(tmp_path)


def options(**changed):
    return Config(data="DIR", **changed)


def content(config=None, step=0, **changed):
    """Return a checkpoint's content, with small tensors."""
    config = config or options()
    saved = {
        "epoch": 3,
        "arch": config.arch,
        "state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)},
        "optimizer": {},
        "step": step,
        "mgd": {"1.margin": torch.ones(1)} if config.teacher else {},
        "config": dataclasses.asdict(config),
        "workers": 2,
        "format": FORMAT,
        "images": 100,
        "order": "a digest",
        "statistics": None,
    }
    return saved | changed


@pytest.mark.parametrize("kind", [Config, LinearConfig])
def test_resume_names_the_option_of_a_missing_file(run, tmp_path, kind):
    config = kind(data="DIR", resume=f"{tmp_path}/x.pth.tar")
    expected = f"--resume {tmp_path}/x.pth.tar: no such file; expected a checkpoint. Check the path"
    assert refused(find if kind is Config else classifier.find, config, run) == expected


# Options with which a run can resume.


def test_load_optimizer_keeps_options():
    def optimizer(**settings):
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], 0.1, **settings)

    saved, resumed = (
        optimizer(momentum=0.9, weight_decay=1e-4),
        optimizer(momentum=0.5, weight_decay=0.1),
    )
    saved.param_groups[0]["params"][0].grad = torch.tensor([1.0, 2.0, 3.0])
    saved.step()
    load_optimizer(resumed, saved.state_dict(), options(momentum=0.5, weight_decay=0.1))
    (group,) = resumed.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.1)
    momenta = [
        one.state[one.param_groups[0]["params"][0]]["momentum_buffer"] for one in (saved, resumed)
    ]
    assert torch.equal(*momenta)


@pytest.mark.parametrize(
    "changed", [{"mgd_stages": [4]}, {"mgd_stages": [1, 2]}, {"matching": "random"}], ids=str
)
def test_resume_ignores_stages_without_teacher(run, changed):
    assert continues(content(step=7), options(**changed), run)


@pytest.mark.parametrize("name", SAVED)
def test_resume_refuses_a_missing_key(run, name):
    config = options(resume="a.pth.tar")
    saved = {key: value for key, value in content(config).items() if key != name}
    assert f"--resume a.pth.tar: has no {name!r}; expected a checkpoint of job.train" in refused(
        continues, saved, config, run
    )


@pytest.mark.parametrize(
    "config", [options(), options(teacher="t"), options(mlp=True, seed=3, mgd_stages=[4])], ids=str
)
@pytest.mark.parametrize("step", [0, 7])
def test_resume_with_same_options_logs_no_change(run, config, step):
    saved = content(config, step)
    assert continues(saved, copy.deepcopy(config), run) is saved
    assert run.log.lines == []


OTHER_SHAPES = {
    "arch": "resnet34",
    "stem": "small",
    "mlp": True,
    "moco_dim": 64,
    "moco_k": 1024,
    "mgd_stages": [4],
}
OTHER_SHAPES |= {"matching": "random", "zero_init_residual": True, "width": 32, "framework": "none"}
OTHER_SHAPES |= {"mgd_correction": True, "mgd_pooled": 1.0, "teacher_size": 224}


def test_other_shapes_are_complete():
    assert {*fixed(options(teacher="t"), within_epoch=False)} == {*OTHER_SHAPES, "distill"}


@pytest.mark.parametrize(("name", "value"), OTHER_SHAPES.items())
@pytest.mark.parametrize("step", [0, 7])
def test_resume_refuses_other_shapes(run, name, value, step):
    message = refused(
        continues, content(options(teacher="t"), step), options(teacher="t", **{name: value}), run
    )
    flag = "--" + name.replace("_", "-")
    before = str(getattr(options(), name))
    assert all(text in message for text in (flag, str(value), before, f"epoch 3, step {step}"))


def test_resume_refuses_other_projector_stages(run):
    """Gram's stages can differ, because they have no tensors."""
    old = content(options(teacher="t", distill=["projector", "gram"]))
    new = {"teacher": "t", "distill": ["projector", "gram"]}
    message = refused(continues, old, options(projector_stages=[4], **new), run)
    assert message.startswith("--projector-stages [4]: the checkpoint of epoch 3, step 0 has [1, 2")
    assert continues(old, options(gram_stages=[4], **new), run)


SIMILARITY = [("similarity", "seed"), ("similarity_k", 9), ("similarity_t", 0.1)]
SIMILARITY += [("similarity", "compress"), ("similarity_m", 0.9)]


@pytest.mark.parametrize(("name", "value"), SIMILARITY)
def test_resume_refuses_other_similarity_shapes(run, name, value):
    """The temperatures and the momentum can."""
    chosen = {"framework": "none", "teacher": "t", "distill": ["similarity"]}
    old, new = content(options(**chosen)), options(**chosen, **{name: value})
    if name in ("similarity_t", "similarity_m"):
        assert continues(old, new, run)
    else:
        message = refused(continues, old, new, run)
        assert message.startswith(f"--{name.replace('_', '-')} {value}: the checkpoint of epoch 3")


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_accepts_published_similarity_values(run, setting):
    """0 means the published values. Older presets set them."""
    k, t, teacher_t = SETTINGS[setting]
    published = {"similarity_k": k, "similarity_t": t, "similarity_teacher_t": teacher_t}
    chosen = {"framework": "none", "teacher": "t", "distill": ["similarity"]}
    chosen["similarity"] = setting
    assert continues(content(options(**chosen, **published)), options(**chosen), run)
    assert continues(content(options(**chosen)), options(**chosen, **published), run)
    assert run.log.lines == []
    other = options(**chosen, similarity_k=k + 1)
    assert "--similarity-k 0: " in refused(continues, content(other), options(**chosen), run)


NO_FRAMEWORK = {"framework": "none", "teacher": "t"}
WIDENED = [
    {"mlp": True},
    {"framework": "simsiam"},
    {"teacher": "t", "distill": ["disco"]},  # if its head is not the framework's
    {**NO_FRAMEWORK, "distill": ["mgd", "simreg"]},
    {**NO_FRAMEWORK, "distill": ["similarity"], "similarity": "seed"},
]
NOT_WIDENED = [{}, {"teacher": "t"}, {**NO_FRAMEWORK, "distill": ["similarity", "gram"]}]


@pytest.mark.parametrize("chosen", WIDENED, ids=str)
def test_resume_refuses_other_head_width(run, chosen):
    message = refused(continues, content(options(**chosen)), options(head_width=9, **chosen), run)
    assert message.startswith("--head-width 9: the checkpoint of epoch 3, step 0 has 0")


@pytest.mark.parametrize("chosen", NOT_WIDENED, ids=str)
def test_resume_ignores_unused_head_width(run, chosen):
    assert continues(content(options(**chosen)), options(head_width=9, **chosen), run)
    assert run.log.lines == []


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("batch_size", 64)])
def test_resume_in_epoch_refuses_other_order(run, name, value):
    config = options(**{name: value})
    assert continues(content(step=0), config, run)
    assert any("--" + name.replace("_", "-") in line for line in run.log.lines)
    message = refused(continues, content(step=7), config, run)
    assert str(value) in message
    assert "step 7" in message


CHANGES = [
    ("lr", 0.1),
    ("epochs", 300),
    ("cos", True),
    ("moco_t", 0.5),
    ("weight_decay", 0.0),
    ("refresh_epochs", "never"),
]


@pytest.mark.parametrize(("name", "value"), CHANGES)
@pytest.mark.parametrize("step", [0, 7])
def test_resume_logs_a_changed_option(run, name, value, step):
    assert continues(
        content(options(teacher="t"), step), options(teacher="t", **{name: value}), run
    )
    [line] = [line for line in run.log.lines if not line.startswith("warning: ")]
    flag = "--" + name.replace("_", "-")
    assert f"{flag} was {getattr(options(), name)}" in line and f"now {value}" in line


def test_resume_logs_each_change_once(run):
    continues(content(options(teacher="t")), options(teacher="t", **dict(CHANGES)), run)
    assert len([line for line in run.log.lines if " was " in line]) == len(CHANGES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resume", "auto"),
        ("config", ["small"]),
        ("out", "o"),
        ("workers", 7),
        ("print_freq", 1),
        # Of a teacher, which the run does not have.
        ("loss_share", 0.0),
        ("reducer", "sp"),
        ("mgd_images", 7),
        ("gram_tau", 0.5),
        ("projector_stages", [4]),
        ("distill_weights", [2.0]),
    ],
)
def test_resume_ignores_options_without_effect(run, name, value):
    assert continues(content(), options(**{name: value}), run)
    assert run.log.lines == []


def test_log_changes_of_classifier(run):
    log_changes(
        dataclasses.asdict(LinearConfig(lr=30.0)),
        LinearConfig(lr=1.0),
        "the checkpoint",
        run,
        set(),
    )
    assert run.log.lines == ["--lr was 30.0 in the checkpoint; now 1.0"]


COSINE = dict(cos=True, epochs=4, warmup_epochs=1, lr=0.03)
STEPPED = dict(cos=False, epochs=4, warmup_epochs=0, lr=0.5, schedule=[4])


@pytest.mark.parametrize("kind", [Config, LinearConfig])
@pytest.mark.parametrize(
    ("old", "changed", "epoch", "step", "rates", "advice"),
    [
        (
            COSINE,
            {"epochs": 8},
            4,
            0,
            "0.004393 in epoch 3 to 0.015 in epoch 4",
            "--lr 0.008787 continues at 0.004393",
        ),
        (
            COSINE,
            {"epochs": 8},
            3,
            5,
            "0.004393 in epoch 3 to 0.02074",
            "--lr 0.006355 continues at 0.004393",
        ),
        (
            COSINE,
            {"epochs": 3},
            2,
            0,
            "0.02561 in epoch 1 to 0.0075 in epoch 2",
            "--lr 0.06 continues at 0.015",
        ),
        (
            COSINE,
            {"cos": False},
            3,
            0,
            "0.015 in epoch 2 to 0.03 in epoch 3",
            "--lr 0.004393 continues at 0.004393",
        ),
        (
            COSINE,
            {"warmup_epochs": 3},
            2,
            0,
            "0.02561 in epoch 1 to 0.02001",
            "--lr 0.02249 continues at 0.015",
        ),
        (STEPPED, {"lr": 0.0}, 2, 0, "0.5 in epoch 1 to 0 in epoch 2", ""),
        (
            STEPPED,
            {"schedule": [2]},
            3,
            0,
            "0.5 in epoch 2 to 0.05 in epoch 3",
            "--lr 5 continues at 0.5",
        ),
    ],
)
def test_rate_jump_is_a_warning_with_advice(run, kind, old, changed, epoch, step, rates, advice):
    saved = {"epoch": epoch, "step": step, "config": dataclasses.asdict(kind(data="DIR", **old))}
    config = kind(data="DIR", **old | changed)
    warn_of_rate(saved, config, run)
    [line] = run.log.lines
    [record] = run.log.records
    assert (record["kind"], record["id"], f"warning: {record['text']}") == (
        "warning",
        "rate_jump",
        line,
    )
    assert rates in line and advice in line
    [flag] = (f"--{name.replace('_', '-')}" for name in changed)
    assert f"because of the changed {flag}" in line
    assert ("a run that starts with its final --epochs" in line) == (flag == "--epochs")
    if advice:
        warn_of_rate(saved, dataclasses.replace(config, lr=float(advice.split()[1])), run)
        assert run.log.lines == [line]


@pytest.mark.parametrize(
    ("old", "changed", "epoch"),
    [
        (COSINE, {}, 3),
        (COSINE, {"epochs": 3}, 3),  # no epoch is left
        (STEPPED, {"epochs": 8}, 4),  # the old schedule falls there too
        (STEPPED, {"schedule": [6], "epochs": 8}, 4),
        (STEPPED, {"schedule": [3, 4]}, 2),
    ],
)
def test_rate_without_jump_logs_no_warning(run, old, changed, epoch):
    saved = {"epoch": epoch, "step": 0, "config": dataclasses.asdict(options(**old))}
    warn_of_rate(saved, options(**old | changed), run)
    assert run.log.lines == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (dict(loss_ramp=True, epochs=3), dict(loss_ramp=True, epochs=6), "0 to 0.5, because"),
        (dict(loss_ramp=True, epochs=12), dict(loss_ramp=True, epochs=6), "0.75 to 0.5, because"),
        (dict(epochs=6), dict(loss_ramp=True, epochs=6), "1 to 0.5, because"),
        (dict(loss_ramp=True, epochs=6), dict(loss_ramp=True, epochs=6), None),
        (dict(loss_ramp=True, epochs=6), dict(loss_ramp=True, epochs=3), None),  # no epoch is left
        (dict(epochs=3), dict(epochs=6), None),
    ],
)
def test_ramp_jump_is_a_warning(run, old, new, expected):
    common = dict(teacher="t", batch_size=10)
    continues(content(options(**common, **old)), options(**common, **new), run)
    texts = [record["text"] for record in run.log.records if record["id"] == "ramp_jump"]
    assert [expected in text for text in texts] == [True] * bool(expected)


def test_resume_logs_change_of_newer_option(run):
    saved = content()
    del saved["config"]["knn_k"]
    assert continues(saved, options(), run)
    assert run.log.lines == []
    assert continues(saved, options(knn_k=5), run)
    assert run.log.lines == ["--knn-k was 0 in the checkpoint of epoch 3, step 0; now 5"]


@pytest.mark.parametrize(("name", "value"), [("width", 32), ("zero_init_residual", True)])
def test_resume_refuses_other_shape_of_newer_option(run, name, value):
    saved = content()
    del saved["config"][name]
    assert continues(saved, options(), run)
    assert "; expected the same" in refused(continues, saved, options(**{name: value}), run)


@pytest.mark.parametrize(("before", "now"), [("t", ""), ("", "t")])
def test_resume_refuses_added_or_removed_teacher(run, before, now):
    message = refused(continues, content(options(teacher=before)), options(teacher=now), run)
    assert "--teacher" in message
    assert ("distils" if before else "no teacher") in message


def test_resume_logs_other_teacher_file(run):
    """It can be the same file under another path."""
    assert continues(content(options(teacher="a")), options(teacher="b"), run)
    assert len(run.log.lines) == 1


@pytest.mark.parametrize(("step", "more"), [(0, False), (7, True)])
def test_resume_logs_other_number_of_workers(tmp_path, step, more):
    run = StandIn(tmp_path, size=4)
    assert continues(content(step=step), options(), run)
    [line] = run.log.lines
    assert "2 workers" in line
    assert "now 4" in line
    assert ("average" in line) == more


# The checkpoint that --resume selects.


def test_find_without_resume_is_none(run):
    run.checkpoints.save(content())
    assert find(options(), run)[1] is None
    assert run.log.lines == []


def test_find_auto_without_checkpoint_starts(run):
    assert find(options(resume="auto"), run)[1] is None
    [line] = run.log.lines
    assert run.folder in line
    assert "first epoch" in line


def test_find_auto_skips_damaged_checkpoint(run):
    run.checkpoints.save(content(epoch=1))
    run.checkpoints.save(content(epoch=2))
    broken = run.checkpoints.save(content(epoch=3))
    with open(broken, "r+b") as file:
        file.truncate(200)
    assert find(options(resume="auto"), run)[1]["epoch"] == 2
    assert any(broken in line and "skipped: " in line for line in run.log.lines)


def test_find_auto_refuses_only_damaged_checkpoints(run):
    with open(run.checkpoints.save(content()), "r+b") as file:
        file.truncate(200)
    assert run.folder in refused(find, options(resume="auto"), run)


def test_find_auto_refuses_other_run(run):
    run.checkpoints.save(content())
    assert "--mlp" in refused(find, options(resume="auto", mlp=True), run)


def test_find_loads_a_path(run):
    path = run.checkpoints.save(content(epoch=1))
    run.checkpoints.save(content(epoch=2))
    assert find(options(resume=path), run)[1]["epoch"] == 1


@pytest.mark.parametrize("text", [None, "no checkpoint"])
def test_find_refuses_a_path_without_checkpoint(run, tmp_path, text):
    path = tmp_path / "x.pth.tar"
    if text:
        path.write_text(text)
    assert str(path) in refused(find, options(resume=str(path)), run)


@pytest.mark.parametrize("value", [{"conv1.weight": torch.ones(1)}, {"epoch": 3}, {}], ids=str)
def test_find_refuses_other_content(run, tmp_path, value):
    path = str(tmp_path / "x.pth.tar")
    torch.save(value, path)
    assert path in refused(find, options(resume=path), run)


@pytest.fixture(params=["released", "of another network", "without a network's name"])
def teacher_file(request, tmp_path):
    """A file that cannot be resumed, but can be a teacher."""
    saved = content(options(arch="resnet50"), format=1)
    if request.param != "of another network":
        del saved["format"], saved["config"], saved["step"], saved["mgd"]
    if request.param == "without a network's name":
        del saved["arch"]
    path = str(tmp_path / "teacher.pth.tar")
    torch.save(saved, path)
    return path


def test_find_makes_teacher_s_file_the_teacher(run, teacher_file):
    config, saved = find(options(resume=teacher_file), run)
    assert saved is None
    assert (config.teacher, config.resume) == (teacher_file, "")
    [line] = run.log.lines
    assert teacher_file in line
    assert "--teacher" in line


def test_find_makes_released_file_the_teacher(run, tmp_path):
    path = str(tmp_path / "t.pth.tar")
    torch.save({"arch": "resnet18", "epoch": 200, "state_dict": content()["state_dict"]}, path)
    config, saved = find(options(resume=path), run)
    assert (config.teacher, saved) == (path, None)


def test_find_resumes_requeued_job_with_teacher(run, teacher_file, monkeypatch):
    run.checkpoints.save(content(options(teacher=teacher_file)))
    assert find(options(resume=teacher_file), run)[1] is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert find(options(resume=teacher_file), run)[1]["epoch"] == 3


def test_find_refuses_two_teachers(run, teacher_file):
    message = refused(find, options(resume=teacher_file, teacher="other"), run)
    assert "--resume" in message
    assert "--teacher" in message


def test_resume_after_teacher_in_resume_logs_no_change(run, teacher_file):
    """The next run with --teacher and --resume auto must resume from its checkpoints."""
    config, _ = find(options(resume=teacher_file), run)
    saved = content(config)
    again = options(teacher=teacher_file, resume="auto")
    run.log.lines.clear()
    assert continues(saved, again, run)
    assert run.log.lines == []


def stand_in(module, run, images, digest, **more):
    """Return the fields of a Training that `restore` needs, with a distiller of `module`."""
    distiller = object.__new__(MGD)
    distiller.config, distiller.module = options(teacher="t"), module
    distillation = SimpleNamespace(distillers=[distiller], digest=digest, momentum=None)
    framework = SimpleNamespace(module=torch.nn.Identity())
    return SimpleNamespace(
        config=distiller.config,
        run=run,
        images=images,
        framework=framework,
        distillation=distillation,
        **more,
    )


@pytest.mark.parametrize("teacher", [8, 16])
def test_restore_refuses_other_margins(teacher):
    """The teacher has another width (16), or the same with other margins."""
    saved_by, now = MGDistiller({4: (4, 8)}), MGDistiller({4: (4, teacher)})
    now.margin(4).sub_(1.0)
    training = stand_in(now, None, images=range(100), digest="")
    saved = content(state_dict={}, mgd=saved_by.state_dict())
    assert "its margins differ from the checkpoint's" in refused(restore, saved, training)


@pytest.fixture
def training(run):
    """The parts of a Training with a teacher, whose loss factor is still the default."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    module = MGDistiller({4: (4, 8)})
    return stand_in(module, run, images=range(100), digest="a digest", optimizer=sgd)


def small(width):
    return torch.nn.ModuleDict({"norm": torch.nn.BatchNorm2d(1), "body": torch.nn.Linear(2, width)})


MISFITS = {
    "wider": (small(4), "body.weight is (3, 2), expected (4, 2)."),
    "less": (small(3)["body"], "weight is missing."),
    "other": (torch.nn.ModuleDict({"body": torch.nn.Linear(2, 3)}), "norm.weight is unexpected."),
}


@pytest.mark.parametrize("now", MISFITS)
@pytest.mark.parametrize("changed_network", ["framework", "momentum"])
def test_restore_refuses_changed_network(training, now, changed_network):
    changed, misfit = MISFITS[now]
    training.config = options(arch="own:Net", resume="auto")
    saved = content(state_dict={}, mgd=module(training).state_dict())
    if changed_network == "framework":
        training.framework.module = changed
        saved["state_dict"] = {
            f"module.{name}": value for name, value in small(3).state_dict().items()
        }
    else:
        training.distillation.momentum = SimpleNamespace(module=changed)
        saved["momentum_encoder"] = small(3).state_dict()
    message = refused(restore, saved, training)
    start = "--resume auto: epoch 3, step 0 does not fit the network own:Net: "
    assert message.startswith(start + misfit) and "start a new run with another --out" in message


def test_load_optimizer_refuses_other_parameters():
    one, two = (
        torch.optim.SGD([torch.nn.Parameter(torch.ones(3)) for _ in range(n)], 0.1) for n in (1, 2)
    )
    message = refused(load_optimizer, two, one.state_dict(), options(resume="a.pth.tar"))
    assert "--resume a.pth.tar: the checkpoint does not fit the trained parameters: " in message


def module(training):
    """Return the distiller's module."""
    return training.distillation.distillers[0].module


@pytest.mark.parametrize("before", ["another", "a digest", ""])
def test_restore_refuses_other_teacher(training, before):
    """It is refused even with the same margins. Older checkpoints have no digest."""
    saved = content(
        options(teacher="old.pth"), state_dict={}, mgd=module(training).state_dict(), teacher=before
    )
    saved["optimizer"] = training.optimizer.state_dict()
    if before == "another":
        message = "--teacher t: content of SHA-256 a digest; expected another, the teacher old.pth"
        assert refused(restore, saved, training).startswith(message)
    else:
        assert restore(saved, training) == (3, 0)


def test_restore_adds_bad_images(training):
    saved = content(state_dict={}, mgd=module(training).state_dict(), bad_images=["a.png"])
    saved["optimizer"] = training.optimizer.state_dict()
    training.run.bad_images.add("b.png")
    restore(saved, training)
    assert training.run.bad_images == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"loss_share": 0.3}, {"loss_share": 0.3}, 1 / 3),
        ({"loss_share": 0.3}, {"loss_share": 0.3, "loss_factor": 7.0}, 1 / 3),
        ({"loss_share": 0.3}, {"loss_share": 0.6}, 1 / 6),
        ({"loss_share": 0.3}, {"loss_share": 0.0}, 1e4),
        ({"loss_share": 0.0, "loss_factor": 100.0}, {"loss_share": 0.0, "loss_factor": 7.0}, 7.0),
        ({"distill_weights": [2.0]}, {"distill_weights": [2.0]}, 1 / 3),
        ({}, {"distill_weights": [2.0]}, 2 / 3),
        ({"distill_weights": [4.0]}, {"loss_share": 20.0}, 1 / 24),
    ],
)
def test_restore_scales_the_loss_factor(training, before, now, expected):
    """The loss is not measured again. The same --loss-share has the same factor to the bit."""
    saved_by = MGDistiller({4: (4, 8)}, factor=1 / 3)
    saved = content(options(teacher="t", **before), state_dict={}, mgd=saved_by.state_dict())
    saved["optimizer"] = training.optimizer.state_dict()
    training.distillation.distillers[0].config = options(teacher="t", **now)
    restore(saved, training)
    assert module(training).factor.item() == expected
    lines = [line for line in training.run.log.lines if "loss factor" in line]
    assert lines == (
        []
        if expected == 1 / 3
        else [f"mgd: loss factor {expected:.6g}; in the checkpoint 0.333333"]
    )


def test_resume_refuses_unmeasured_loss_share(run):
    saved = content(options(teacher="t", loss_share=0.0, loss_factor=1234567.0))
    message = refused(continues, saved, options(teacher="t"), run)
    assert (
        "--loss-share 10" in message
        and "epoch 3, step 0" in message
        and "Give --loss-factor 1234567.0," in message
    )
    assert continues(content(), options(loss_share=0.1), run)  # no teacher, so no effect
    for share in (0.0, 0.1, 0.2):
        assert continues(
            content(options(teacher="t", loss_share=0.1)),
            options(teacher="t", loss_share=share),
            run,
        )


def test_restore_in_epoch_refuses_other_images():
    """Between epochs they can change. Packing changes the order of the images."""
    images = Images("DIR/train", ["a"], Names.of(["a/1.png"] * 100), np.zeros(100), 0)
    training = SimpleNamespace(images=images, order=lambda epoch: f"order of epoch {epoch}")
    assert "DIR/train has other images or another order" in refused(
        restore, content(step=2, order="another"), training
    )
    assert "has 100 images; expected 99" in refused(
        restore, content(step=2, images=99, order="order of epoch 3"), training
    )


def test_check_folder_refuses_other_run(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "checkpoint_0002_000000.pth.tar").touch()
    run = StandIn(here)
    assert "has another run" in refused(
        check_folder, options(resume=str(there / "checkpoint_0002_000000.pth.tar")), run
    )
    check_folder(options(resume=str(here / "checkpoint_0002_000000.pth.tar")), run)
    assert run.log.lines == []


def test_check_folder_accepts_other_name_of_folder(tmp_path):
    folder, name = tmp_path / "run", tmp_path / "name"
    for path in (folder, name):
        path.mkdir()
    mount("-t", "tmpfs", "tmpfs", folder)
    try:
        (folder / "checkpoint_0002_000000.pth.tar").touch()
        mount("--bind", folder, name)
        check_folder(options(resume=str(name / "checkpoint_0002_000000.pth.tar")), StandIn(folder))
    finally:
        unmount(name)
        unmount(folder)


def test_load_optimizer_converts_strides():
    """Momenta of a checkpoint are contiguous, and a run's parameters are channels last."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    before, now = (
        torch.nn.Parameter(weight.to(memory_format=each))
        for each in (torch.contiguous_format, torch.channels_last)
    )
    one, other = (torch.optim.SGD([each], 0.1, momentum=0.9) for each in (before, now))
    before.grad = weight.clone()
    one.step()
    load_optimizer(other, one.state_dict(), options())
    loaded, saved = (
        each.state[each.param_groups[0]["params"][0]]["momentum_buffer"] for each in (other, one)
    )
    assert torch.equal(loaded, saved) and loaded.stride() == now.stride() != saved.stride()
