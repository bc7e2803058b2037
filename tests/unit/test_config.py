"""The options of job.train and job.linear on the command line, and which go together."""

import argparse
import dataclasses
import importlib
import os
import pwd
import re
import shlex

import pytest
import yaml

import errors
import runs
from job.cli import Parser
from job.config import OF_TEACHER, RETIRED, Config, LinearConfig, read_config
from job.declare import differing, flag, groups, words_of
from job.distill import DISTILLERS, Distiller
from job.errors import RunError

FIELDS = [field.name for field in dataclasses.fields(Config)]


def refused(*argv):
    """Return the error of a command line of job.train."""
    return errors.refused(read_config, [str(argument) for argument in argv])


def test_published_command_of_moco():
    line = "DIR -a resnet18 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos"
    config = read_config([*line.split(), "--teacher", "x"])
    expected = dict(data="DIR", arch="resnet18", lr=0.03, batch_size=256, mlp=True, moco_t=0.2)
    expected |= dict(aug_plus=True, cos=True, teacher="x")
    assert config == Config(**expected)


def test_defaults_are_the_published_recipe():
    """The distillation strength, --loss-share, is an exception."""
    recipe = dict(arch="resnet18", lr=0.03, batch_size=256, epochs=200, warmup_epochs=3)
    recipe |= dict(moco_dim=128, moco_k=65536, moco_m=0.999, moco_t=0.07, momentum=0.9)
    recipe |= dict(weight_decay=1e-4, schedule=[120, 160], reducer="amp", loss_share=10)
    recipe |= dict(refresh_epochs="log", mgd_images=20_000, mgd_correction=False, mgd_pooled=0.0)
    recipe |= dict(mlp=False, aug_plus=False, cos=False, teacher="", resume="")
    config = dataclasses.asdict(read_config(["DIR"]))
    assert {name: config[name] for name in recipe} == recipe


FLAGS = [
    ("-a resnet50", "arch", "resnet50"),
    ("--arch resnet50", "arch", "resnet50"),
    ("--stem small", "stem", "small"),
    ("--width 32", "width", 32),
    ("--zero-init-residual", "zero_init_residual", True),
    ("--image-size 64", "image_size", 64),
    ("--aug-plus", "aug_plus", True),
    ("--no-aug-plus", "aug_plus", False),
    ("--weak-views", "weak_views", True),
    ("--augment-on device", "augment_on", "device"),
    ("--epochs 7", "epochs", 7),
    ("-b 32", "batch_size", 32),
    ("-b32", "batch_size", 32),
    ("--batch-size=32", "batch_size", 32),
    ("--accumulate 2", "accumulate", 2),
    ("--lr 0.1", "lr", 0.1),
    ("--lr 3e-2", "lr", 0.03),
    ("--lr 1", "lr", 1.0),
    ("--learning-rate 0.1", "lr", 0.1),
    ("--schedule 3 5", "schedule", [3, 5]),
    ("--cos", "cos", True),
    ("--warmup-epochs 0", "warmup_epochs", 0),
    ("--momentum 0.5", "momentum", 0.5),
    ("--wd 0.5", "weight_decay", 0.5),
    ("--weight-decay 0", "weight_decay", 0.0),
    ("--seed 9223372036854775807", "seed", 2**63 - 1),
    ("-j 4", "workers", 4),
    ("--workers -1", "workers", -1),
    ("--moco-dim 64", "moco_dim", 64),
    ("--moco-k 1024", "moco_k", 1024),
    ("--moco-m 0.99", "moco_m", 0.99),
    ("--moco-t 0.2", "moco_t", 0.2),
    ("--mlp", "mlp", True),
    ("--no-mlp", "mlp", False),
    ("--teacher t.pth.tar", "teacher", "t.pth.tar"),
    ("--teacher t --teacher-arch resnet50", "teacher_arch", "resnet50"),
    ("--teacher t --teacher-size 224", "teacher_size", 224),
    ("--reducer sp", "reducer", "sp"),
    ("--loss-factor 1e2", "loss_factor", 100.0),
    ("--loss-share 0.05", "loss_share", 0.05),
    ("--loss-ramp", "loss_ramp", True),
    ("--no-loss-ramp", "loss_ramp", False),
    ("--margins init", "margins", "init"),
    ("--mgd-stages 4 2 4", "mgd_stages", [2, 4]),
    ("--stage-weights 0 0 0.5 1", "stage_weights", [0.0, 0.0, 0.5, 1.0]),
    ("--matching random", "matching", "random"),
    ("--mgd-images 500", "mgd_images", 500),
    ("--mgd-correction", "mgd_correction", True),
    ("--mgd-pooled 2", "mgd_pooled", 2.0),
    ("--refresh-epochs every:3", "refresh_epochs", "every:3"),
    ("--resume auto", "resume", "auto"),
    ("--save-every 500steps", "save_every", "500steps"),
    ("--keep 1", "keep", 1),
    ("--check-every 1", "check_every", 1),
    ("--knn-every 2", "knn_every", 2),
    ("--knn-every 2 --knn-k 20", "knn_k", 20),
    ("--crop-min 0.08", "crop_min", 0.08),
    ("--precision bf16", "precision", "bf16"),
    ("--compile", "compile", True),
    ("--fp16-allreduce", "fp16_allreduce", True),
    ("--deterministic", "deterministic", True),
    ("-p 5", "print_freq", 5),
    ("--tensorboard", "tensorboard", True),
    ("--log-to wandb", "log_to", ["wandb"]),
    ("--log-to mlflow my.module:make", "log_to", ["mlflow", "my.module:make"]),
    ("--print-freq 5", "print_freq", 5),
    ("--max-bad-images 0", "max_bad_images", 0),
    ("--out runs/x", "out", "runs/x"),
    ("--more-data A B", "more_data", ["A", "B"]),
    ("--config small", "config", ["small"]),
    ("--framework none", "framework", "none"),
    ("--distill mgd", "distill", ["mgd"]),
    ("--distill-weights 2", "distill_weights", [2.0]),
    ("--distill gram projector --distill-weights 1 0.5", "distill_weights", [1.0, 0.5]),
    ("--distill projector --projector-stages 4 2 4", "projector_stages", [2, 4]),
    ("--distill gram --gram-stages 4 3", "gram_stages", [3, 4]),
    ("--distill gram --gram-tau 0.2", "gram_tau", 0.2),
    ("--dim 1024 --framework simsiam", "dim", 1024),
    ("--pred-dim 64 --framework simsiam", "pred_dim", 64),
    ("--head-width 2048 --framework simsiam", "head_width", 2048),
    ("--fix-pred-lr --framework simsiam", "fix_pred_lr", True),
    ("--sync-bn heads --framework simsiam", "sync_bn", "heads"),
    ("--distill similarity --similarity seed", "similarity", "seed"),
    ("--distill similarity --similarity-k 9", "similarity_k", 9),
    ("--distill similarity --similarity-t 0.5", "similarity_t", 0.5),
    ("--distill similarity --similarity-teacher-t 0.5", "similarity_teacher_t", 0.5),
    ("--distill similarity --similarity compress --similarity-m 0.9", "similarity_m", 0.9),
    ("--mgd-views 1 --framework simsiam", "mgd_views", 1),
]


@pytest.mark.parametrize(("line", "name", "value"), FLAGS)
def test_flag_sets_its_option(line, name, value):
    teacher = ["--teacher", "t"] if name in OF_TEACHER else []
    result = getattr(read_config(["DIR", *teacher, *line.split()]), name)
    assert result == value
    assert type(result) is type(value)


def test_flags_above_cover_every_option():
    assert {name for _, name, _ in FLAGS} == set(FIELDS) - {"data"}


@pytest.mark.parametrize(
    "argv", [["DIR"], ["--data", "DIR"], ["DIR", "--data", "DIR"], ["--cos", "DIR"], ["--data=DIR"]]
)
def test_data_folder_is_positional_or_a_flag(argv):
    assert read_config(argv).data == "DIR"


@pytest.mark.parametrize("kind", [Config, LinearConfig])
def test_more_data_of_command_line_and_file(kind, write_yaml):
    file = write_yaml("data: A\nmore_data: [B, C]\n")
    more = write_yaml("more_data: B\n", "more.yaml")
    for argv, expected in {
        "A B C --epochs 2": ["A", "B", "C"],
        "--epochs 2 A B C": ["A", "B", "C"],
        "A --more-data B C": ["A", "B", "C"],
        f"--config {file}": ["A", "B", "C"],
        f"D --config {file}": ["D"],
        f"D E --config {file}": ["D", "E"],
        f"--data D --config {file}": ["D"],
        f"--more-data D --config {file}": ["A", "D"],
        f"D --config {more}": ["D", "B"],
    }.items():
        assert read_config(argv.split(), kind=kind).images_from == expected


USER = pwd.getpwuid(os.getuid())
PATHS = {Config: {"data", "more_data", "config", "out", "teacher", "resume"}}
PATHS[LinearConfig] = {"data", "more_data", "config", "out", "pretrained", "resume"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a YAML file in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("lr: 0.5\n")
    return str(tmp_path)


@pytest.mark.parametrize("kind", PATHS)
def test_path_options(kind):
    assert {f.name for f in dataclasses.fields(kind) if f.metadata["path"]} == PATHS[kind]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in PATHS for name in sorted(PATHS[kind])]
)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/a.yaml", "{home}/a.yaml"),
        ("./~/a.yaml", "./~/a.yaml"),
        (f"~{USER.pw_name}/a.yaml", f"{USER.pw_dir}/a.yaml"),
    ],
)
def test_home_is_expanded_in_each_path(home, write_yaml, monkeypatch, kind, name, given, expected):
    expected = expected.format(home=home)
    if name == "config":
        monkeypatch.setattr("job.cli.read_yaml", lambda path, known: {"out": path})
        config = read_config(["DIR", f"--config={given}"], kind=kind)
        assert (config.config, config.out) == ([expected], expected)
        return
    for argv in (
        [f"{flag(name)}={given}"],
        [flag(name), given],
        ["--config", write_yaml(f"{name}: {given}\n")],
    ):
        config = read_config([*["DIR"] * (name != "data"), *argv], kind=kind)
        assert getattr(config, name) in (expected, [expected])
    if name == "data":
        assert read_config([given, f"--data={expected}"], kind=kind).data == expected


def test_home_may_have_a_config_file(home):
    assert read_config(["DIR", "--config", "~/a.yaml"]).lr == 0.5


@pytest.mark.parametrize(
    "argv",
    [["~nobody-here/x"], ["DIR", "--out=~nobody-here/x"], ["DIR", "--config", "~nobody-here/x"]],
)
def test_home_of_an_unknown_user_is_an_error(argv):
    message = refused(*argv)
    assert "~nobody-here/x: ~nobody-here has no home folder" in message
    assert "write ./~nobody-here/x" in message


PROGRAMS = [
    ("job.pack", "~/1 ~/2", {"data": "1", "out": "2"}),
    ("job.export", "~/1 ~/2", {"checkpoint": "1", "output": "2"}),
    ("job.show.watch.app", "~/1 ~/2", {"runs": ["1", "2"]}),
    (
        "job.show.report.app",
        "~/1 ~/2 --out=~/3 --data=~/4 --teacher=~/5",
        {"runs": ["1", "2"], "out": "3", "data": ["4"], "teacher": "5"},
    ),
    ("job.study.study", "~/1 --out=~/2", {"form": "1", "out": "2"}),
]


@pytest.mark.parametrize(("program", "line", "expected"), PROGRAMS)
def test_home_is_expanded_in_other_programs(home, monkeypatch, program, line, expected):
    parsed = {}

    def parse(self, argv):
        parsed.update(vars(argparse.ArgumentParser.parse_args(self, argv)))
        raise RunError("parsed")

    monkeypatch.setattr(Parser, "parse_args", parse)
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(line.split())
    at_home = {
        name: [f"{home}/{part}" for part in value] if isinstance(value, list) else f"{home}/{value}"
        for name, value in expected.items()
    }
    assert {name: parsed[name] for name in expected} == at_home


@pytest.mark.parametrize("name", sorted(RETIRED))
@pytest.mark.parametrize("form", ["{} 1", "{}=1", "{}"])
def test_retired_flag_names_its_replacement(name, form):
    message = refused("DIR", *form.format(name).split(), "--no-such-flag")
    replacements = ("horovodrun -np", "--resume auto", "CUDA_VISIBLE_DEVICES", "leave it out")
    assert name in message
    assert any(replacement in message for replacement in replacements)


RELEASED = """
    -a --arch -j --workers --epochs --start-epoch -b --batch-size --lr --learning-rate --momentum
    --wd --weight-decay -p --print-freq --resume --world-size --rank --dist-url --dist-backend
    --seed --gpu --multiprocessing-distributed
"""
SIMSIAM = "--dim --pred-dim --fix-pred-lr"
LINCLS = "-e --evaluate --pretrained --lars"


@pytest.mark.parametrize(("kind", "own"), [(Config, SIMSIAM), (LinearConfig, LINCLS)])
def test_flags_of_simsiam_s_programs_are_known(kind, own):
    """All mean the same, except their --lr, which is for a batch of 256."""
    options = {
        name for f in dataclasses.fields(kind) for name in (*f.metadata["flags"], flag(f.name))
    }
    assert {*RELEASED.split(), *own.split()} - options - RETIRED.keys() == set()
    retired = "--multiprocessing-distributed --dist-url --dist-backend --world-size --rank"
    assert {*retired.split(), "--gpu", "--start-epoch"} <= RETIRED.keys()


def test_later_files_and_command_line_win(write_yaml):
    first = write_yaml("lr: 0.1\nepochs: 5\nmlp: true\nseed: 1\nschedule: [1, 2]\n", "first.yaml")
    second = write_yaml("epochs: 6\nseed: 2\n", "second.yaml")
    config = read_config(
        ["DIR", "--config", first, "--config", second, "--seed", "3", "--no-mlp", "--schedule", "4"]
    )
    expected = (0.1, 6, 3, False, [4])
    assert (config.lr, config.epochs, config.seed, config.mlp, config.schedule) == expected
    assert config.config == [first, second]


def test_differing_options_are_a_command_line():
    line = "--data 'a b' --lr 0.5 --schedule 3 4 --weak-views --moco-k 8"
    config = read_config(shlex.split(line))
    shown = runs.shown_options(config)
    assert sorted(shown.split(" --")) == sorted(line.split(" --"))
    assert read_config(shlex.split(shown)) == config
    assert differing({"mlp": False, "k": 1}, {"mlp": True}) == "--no-mlp --k 1"
    assert differing({"mlp": False, "k": 1}, {"mlp": True}, {"k"}) == "--no-mlp"


@pytest.mark.parametrize(
    ("kind", "line", "file", "unused"),
    [
        (Config, "--data=-x", "", set()),
        (Config, "DIR", "schedule: []", set()),
        (Config, "DIR", "cos: true\nschedule: [1]", {"schedule"}),
        (Config, "DIR", "knn_k: 5", {"knn_k"}),
        (Config, "DIR -a timm/resnet18", "width: 16", {"width"}),
        (Config, "DIR", "head_width: 9", {"head_width"}),
        (Config, "DIR --framework simsiam", "moco_k: 9", {"moco_k"}),
        (Config, "DIR --teacher t --matching random", "", set()),
        (Config, "DIR --teacher t", "loss_share: 1\nloss_factor: 7", {"loss_factor"}),
        (Config, "DIR --teacher t --distill similarity", "similarity_m: 0.9", {"similarity_m"}),
        (LinearConfig, "DIR --lars --lr 30", "", set()),
        (LinearConfig, "DIR --cos", "schedule: [1]", {"schedule"}),
        (LinearConfig, "DIR", "knn_k: 5", {"knn_k"}),
        (LinearConfig, "DIR -a timm/resnet18 --width 16", "", {"width"}),
    ],
)
def test_shown_options_without_effect_are_left_out(write_yaml, kind, line, file, unused):
    argv = [*line.split(), "--config", write_yaml(f"{file}\n")]
    config = dataclasses.replace(read_config(argv, kind=kind), config=[])
    again = dataclasses.asdict(read_config(shlex.split(runs.shown_options(config)), kind=kind))
    assert {n for n, value in dataclasses.asdict(config).items() if value != again[n]} == unused


def test_default_lists_are_not_shared():
    read_config(["DIR"]).schedule.append(7)
    assert read_config(["DIR"]).schedule == [120, 160]


def test_schedule_with_cos_is_refused_on_command_line(write_yaml):
    path = write_yaml("cos: true\nschedule: [1]\n")
    assert read_config(["DIR", "--config", path]).cos
    assert "--no-cos" in refused("DIR", "--config", path, "--schedule", 2)
    assert read_config(["DIR", "--config", path, "--schedule", "2", "--no-cos"]).schedule == [2]


FACTOR, SHARE, BOTH = "loss_factor: 7\n", "loss_share: 0.5\n", "loss_share: 0.5\nloss_factor: 7\n"


@pytest.mark.parametrize(
    ("texts", "flags", "share", "factor"),
    [
        ([], "", 10, None),
        ([], "--loss-factor 2", 0, 2),
        ([], "--loss-factor 2 --loss-share 0", 0, 2),
        ([FACTOR], "", 0, 7),
        ([FACTOR], "--loss-share 0.1", 0.1, None),
        ([SHARE], "", 0.5, None),
        ([SHARE], "--loss-factor 2", 0, 2),
        ([SHARE, FACTOR], "", 0, 7),
        ([FACTOR, SHARE], "", 0.5, None),
        ([BOTH], "", 0.5, None),
        ([BOTH], "--loss-factor=2", 0, 2),
        ([FACTOR + "loss_share: 0\n"], "", 0, 7),
    ],
)
def test_later_of_loss_factor_and_loss_share_wins(tmp_path, texts, flags, share, factor):
    """In a file with both, such as a run's config.yaml, a loss_share above 0 wins."""
    given = ["--teacher", "t", *flags.split()]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        given += ["--config", str(tmp_path / f"{number}.yaml")]
    config = read_config(["DIR", *given])
    assert config.loss_share == share and factor in (None, config.loss_factor)


def test_loss_factor_with_loss_share_is_refused():
    message = refused("DIR", "--loss-factor=2", "--loss-share", 0.1)
    parts = ("--loss-factor", "--loss-share 0.1", "leave out one")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            "--stage-weights 1 2",
            ["--stage-weights 1 2", "expected one weight for each", "--mgd-stages 1 2 3 4"],
        ),
        ("--stage-weights 1 2 3 4 5", ["expected one weight for each"]),
        ("--mgd-stages 3 4 --stage-weights 0 0", ["--stage-weights 0 0", "above 0"]),
        ("--mgd-stages 4 3 --stage-weights 1 2", ["ascending", "4 3"]),
        ("--mgd-stages 3 3 4 --stage-weights 1 2 3", ["each once", "3 3 4"]),
        (
            "--distill-weights 1 0.5",
            ["--distill-weights 1 0.5: expected one weight for each", "--distill mgd"],
        ),
        (
            "--distill gram mgd --distill-weights 1",
            ["expected one weight for each", "--distill gram mgd"],
        ),
        ("--distill gram mgd --distill-weights 0 0", ["--distill-weights 0 0", "above 0"]),
        ("--distill gram mgd --distill-weights 1 -1", ["--distill-weights -1", "at least 0"]),
    ],
)
def test_weights_must_fit_stages_or_distillers(options, parts):
    message = refused("DIR", *options.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("options", ["--mgd-stages 4 2 4", "--mgd-stages 2 4 --stage-weights 0 1"])
def test_stages_are_sorted(options):
    """They must be in order only with --stage-weights."""
    assert read_config(["DIR", "--teacher", "t", *options.split()]).mgd_stages == [2, 4]


@pytest.mark.parametrize(("matching", "epochs"), [("random", "never"), ("solved", "every:2")])
def test_random_matching_has_no_refreshes(matching, epochs, write_yaml):
    path = write_yaml("refresh_epochs: every:2")
    config = read_config(["DIR", "--teacher", "t", "--config", path, "--matching", matching])
    assert dataclasses.asdict(config)["refresh_epochs"] == epochs


def test_refreshes_of_random_matching_are_refused(write_yaml):
    path = write_yaml("matching: random\n")
    assert "--matching random" in refused("DIR", "--config", path, "--refresh-epochs", "every:2")
    assert "leave out one" in refused("DIR", "--refresh-epochs=0", "--matching", "random")
    line = ["DIR", "--teacher", "t", "--config", path, "--matching", "solved"]
    assert read_config([*line, "--refresh-epochs", "0"]).refresh_epochs == "0"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("--framework none --moco-k 5", "--moco-k 5"),
        ("--framework none --mlp", "--mlp"),
        ("--distill toy --mgd-images=5", "--mgd-images 5"),
        ("--distill toy --mgd-correction", "--mgd-correction"),
        ("--distill toy --mgd-pooled 1", "--mgd-pooled 1.0"),
        ("--distill toy --reducer rd", "--reducer rd"),
        ("--distill toy --gram-tau 0.2", "--gram-tau 0.2"),
    ],
)
def test_option_without_its_method_is_refused(write_yaml, monkeypatch, line, shown):
    """The command line refuses it. A file may have it."""
    monkeypatch.setitem(DISTILLERS, "toy", Distiller)
    choice, value = line.split()[:2]
    given = ["DIR", "--teacher", "t"]
    message = refused(*given, *line.split())
    assert message.startswith(f"{shown}: no effect with {choice} {value}"), message
    assert read_config([*given, "--no-mlp", choice, value]).mlp is False  # as by default
    path = write_yaml("moco: {k: 5, mlp: false}\nmgd: {images: 5, reducer: rd}")
    assert read_config([*given, "--config", path, choice, value]).moco_k == 5


def test_knn_k_without_knn_every_is_refused(write_yaml):
    """The command line refuses it. A file may have it."""
    reason = "no effect without --knn-every; leave it out, or add --knn-every 1"
    assert refused("DIR", "--knn-k", 5) == f"--knn-k 5: {reason}"
    assert read_config(["DIR", "--knn-k", "0"]).knn_k == 0  # as by default
    assert read_config(["DIR", "--config", write_yaml("knn: {k: 5}")]).knn_k == 5
    path = write_yaml("knn: {every: 1}")
    assert read_config(["DIR", "--config", path, "--knn-k", "5"]).knn_k == 5


WITH_TEACHER = {
    "teacher_arch": "resnet50",
    "teacher_size": 224,
    "distill": ["mgd", "gram"],
    "distill_weights": [2.0],
    "loss_share": 0.5,
    "loss_ramp": True,
    "mgd_images": 5,
    "mgd_stages": [3, 4],
    "mgd_correction": True,
    "gram_tau": 0.2,
    "similarity_m": 0.9,
    "mgd_views": 1,
}


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_option_of_the_teacher_needs_a_teacher(write_yaml, name):
    value = WITH_TEACHER[name]
    argv = words_of(name, value)
    reason = "no effect without --teacher; leave it out, or add --teacher FILE"
    assert refused("DIR", *argv) == refused("DIR", *argv, "--resume", "auto")
    assert refused("DIR", *argv) == f"{' '.join(argv)}: {reason}"
    path = write_yaml(yaml.safe_dump({name: value}))
    assert getattr(read_config(["DIR", "--config", path]), name) == value
    if default := getattr(Config(), name):
        assert read_config(["DIR", *words_of(name, default)]) == read_config(["DIR"])


@pytest.mark.parametrize("line", ["--loss-ramp", "--distill gram --gram-tau 2", "--teacher-size 9"])
def test_teacher_of_a_file_or_of_resume_counts(write_yaml, line):
    """In MGD's own program --resume names the teacher's file."""
    path = write_yaml("teacher: t\n")
    for teacher in (["--config", path], ["--resume", "t.pth.tar"]):
        assert read_config(["DIR", *teacher, *line.split()])


@pytest.mark.parametrize("line", ["--teacher-arch resnet50", "--teacher-size 9"])
def test_file_of_features_has_no_network(write_yaml, line):
    name, value = line[2:].replace("-", "_").split()
    path = write_yaml(f"{{{name}: {value}, teacher: t.npy}}")
    reason = "no effect with --teacher t.npy, a file of features; leave it out"
    assert refused("DIR", "--teacher", "t.npy", *line.split()) == f"{line}: {reason}"
    assert str(getattr(read_config(["DIR", "--config", path]), name)) == value


@pytest.mark.parametrize("setting", ["headless", "seed"])
def test_similarity_m_needs_a_momentum_encoder(setting):
    line = ["DIR", "--teacher", "t", "--distill", "similarity", "--similarity", setting]
    line += ["--similarity-m", "0.9"]
    message = refused(*line)
    assert message.startswith(f"--similarity-m 0.9: no effect with --similarity {setting}")
    assert read_config([*line[:-1], "0.999"]).similarity_m == 0.999  # as by default
    message = refused("DIR", "--teacher", "t", "--similarity-m", "0.9")
    assert message.startswith("--similarity-m 0.9: no effect with --distill mgd; ")


def test_option_of_one_of_several_distillers_counts(monkeypatch):
    monkeypatch.setitem(DISTILLERS, "toy", Distiller)
    line = "DIR --teacher t --moco-k 5 --framework moco --distill toy mgd --mgd-images 5"
    assert read_config(line.split()).mgd_images == 5


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("", "or add --mlp"),
        ("--framework none --teacher t", "leave it out"),
        ("--framework none --teacher t --distill similarity", "leave it out"),  # headless
        ("--framework none --teacher t --distill similarity --similarity compress", "leave it out"),
    ],
)
def test_head_width_needs_a_head_with_a_hidden_layer(line, fix):
    message = refused("DIR", "--head-width", 9, *line.split())
    assert message.startswith("--head-width 9: no effect without a head") and fix in message
    for head in ("--mlp", "--teacher t --distill similarity --similarity seed"):
        assert read_config(["DIR", "--head-width", "9", *head.split()]).head_width == 9


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("DIR --foo", ["--foo"]),
        ("DIR --foo=1", ["--foo"]),
        ("DIR --bach-size 1", ["--bach-size", "did you mean --batch-size?"]),
        ("DIR --moco.k 5", ["--moco.k", "did you mean --moco-k?"]),
        ("DIR --moco.k=5", ["--moco.k", "did you mean --moco-k?"]),
        ("DIR --optimizer.seed 5", ["--optimizer.seed", "did you mean --seed?"]),
        ("DIR --epoch 1", ["--epoch 1; did you mean --epochs?"]),
        ("DIR --devise cuda", ["--devise cuda (all options"]),  # far from all: no suggestion
        ("DIR --device cuda", ["--device: no such option", "CUDA_VISIBLE_DEVICES=0,1"]),
        ("DIR --gpus=0", ["--gpus: no such option", "CUDA_VISIBLE_DEVICES="]),
        ("DIR --moco 1", ["--moco"]),  # an abbreviation
        ("DIR --no-lr", ["--no-lr"]),
        ("DIR -x", ["-x"]),
        ("DIR other --data third", ["DIR DIR and --data third: expected one"]),
        ("DIR other --more-data third", ["DIR other and --more-data: expected one"]),
        ("DIR --lr", ["--lr", "argument"]),
        ("DIR --lr=", ["--lr", "''", "a number"]),
        ("DIR --lr fast", ["--lr", "'fast'", "a number"]),
        ("DIR --lr nan", ["--lr", "nan", "finite"]),
        ("DIR --lr inf", ["--lr", "inf", "finite"]),
        ("DIR --lr -1", ["--lr", "-1", "at least 0"]),
        ("DIR --epochs 1.5", ["--epochs", "'1.5'", "an integer"]),
        ("DIR --epochs 0", ["--epochs", "0", "at least 1"]),
        ("DIR --mlp=1", ["--mlp", "'1'"]),
        ("DIR -a resnet81", ["--arch", "'resnet81'", "resnet18"]),
        ("DIR -b 0", ["--batch-size", "0", "at least 1"]),
        ("DIR -j -2", ["--workers", "-2", "at least -1"]),
        ("DIR --image-size 7", ["--image-size", "7", "at least 8"]),
        ("DIR --keep 0", ["--keep", "0", "at least 1"]),
        ("DIR --moco-m 1", ["--moco-m", "1", "below 1"]),
        ("DIR --loss-factor 0", ["--loss-factor", "0", "above 0"]),
        ("DIR --loss-share -0.1", ["--loss-share", "-0.1", "at least 0"]),
        ("DIR --matching solve", ["--matching", "'solve'", "solved, random"]),
        ("DIR --stage-weights 1 1 1 x", ["--stage-weights", "'x'", "a number"]),
        ("DIR --stage-weights 1 1 1 inf", ["--stage-weights", "inf", "finite"]),
        ("DIR --crop-min 1.5", ["--crop-min", "1.5", "at most 1"]),
        ("DIR --width 24", ["--width 24: expected a multiple of 16"]),
        ("DIR --width 8", ["--width 8: expected at least 16 and a multiple of 16"]),
        ("DIR --mgd-stages 1 5", ["--mgd-stages", "5", "below 5"]),
        ("DIR --refresh-epochs 0,5,", ["--refresh-epochs", "'0,5,'", "0,5,10"]),
        ("DIR --save-every 0steps", ["--save-every", "'0steps'", "500steps"]),
        ("DIR --weak-views --aug-plus", ["--weak-views and --aug-plus", "--no-aug-plus"]),
        ("--schedule 1 2 DIR", ["--schedule", "'DIR'", "an integer"]),
        ("", ["DIR: missing", "folder of images"]),
        ("--lr 0.1", ["DIR: missing", "digits"]),
        ("DIR --data OTHER", ["DIR DIR and --data OTHER: expected one"]),
    ],
)
def test_wrong_command_line_is_refused(line, parts):
    message = refused(*line.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("kind", [Config, LinearConfig])
def test_help_lists_each_option_once_in_its_group(capsys, kind):
    with pytest.raises(SystemExit) as ended:
        read_config(["--help"], kind=kind)
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    head, *parts = re.split(r"^(\S.*) \((\w+)\):$", shown, flags=re.MULTILINE)
    sections = dict(zip(parts[1::3], parts[2::3], strict=True))
    for name, group in groups(kind).items():
        listed = re.findall(r"^  (-.*?)(?:  .*)?$", sections[name], re.MULTILINE)
        lines = [
            [line for line in listed if flag(each) in re.split(r"[ ,]+", line)]
            for each in group.options
        ]
        assert [len(each) for each in lines] == [1] * len(listed), name
    titles = parts[0::3]
    assert len(set(titles)) == len(titles) and kind.__doc__ not in titles
    assert " ".join(head.split()).count(kind.__doc__) == 1


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("DIR", "runs/resnet18"),
        ("DIR -a resnet34", "runs/resnet34"),
        ("DIR --teacher x", "runs/resnet18"),
        ("DIR --teacher x --out o", "o"),
    ],
)
def test_folder_of_a_run(line, folder):
    assert read_config(line.split()).folder() == folder


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (Config, {"distill": "projector"}, "--distill 'projector': expected a list"),
        (Config, {"mgd_stages": 4}, "--mgd-stages 4: expected a list"),
        (Config, {"log_to": "wandb"}, "--log-to 'wandb': expected a list"),
        (Config, {"mgd_stages": [[4]]}, "--mgd-stages [4]: expected an integer"),
        (Config, {"stage_weights": ["a"]}, "--stage-weights 'a': expected a number"),
        (LinearConfig, {"schedule": 60}, "--schedule 60: expected a list"),
    ],
)
def test_list_option_from_python_must_be_a_list(kind, options, expected):
    assert errors.refused(kind, data="DIR", **options) == expected
