import argparse
import dataclasses
import importlib
import os
import pwd
import re
from importlib import resources

import pytest
import yaml

from job.config import OF_TEACHER, RETIRED, Config, LinearConfig, read_config
from job.errors import RunError
from job.cli import Parser
from job.declare import flag, groups, words_of
from job.distill import DISTILLERS, Distiller

FIELDS = [field.name for field in dataclasses.fields(Config)]
FILES = (resources.files("job") / "presets").iterdir()
PRESETS = sorted(file.name.removesuffix(".yaml") for file in FILES if file.name.endswith(".yaml"))


def refused(*argv):
    """The message with which a command line is refused: one line, and the exit code of a user's mistake."""
    with pytest.raises(RunError) as caught:
        read_config([str(argument) for argument in argv])
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Write a YAML file; give its path."""

    def written(text, name="options.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return written


def test_the_published_command_reads_as_it_does_in_moco():
    line = (
        "DIR -a resnet18 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos --teacher x"
    )
    config = read_config(line.split())
    assert dataclasses.asdict(config) == dataclasses.asdict(
        Config(
            data="DIR",
            arch="resnet18",
            lr=0.03,
            batch_size=256,
            mlp=True,
            moco_t=0.2,
            aug_plus=True,
            cos=True,
            teacher="x",
        )
    )


def test_the_defaults_are_those_of_the_published_recipe_but_for_the_pull_s_strength():
    config = read_config(["DIR"])
    assert (config.arch, config.lr, config.batch_size, config.epochs) == (
        "resnet18",
        0.03,
        256,
        200,
    )
    assert (config.moco_dim, config.moco_k, config.moco_m, config.moco_t) == (
        128,
        65536,
        0.999,
        0.07,
    )
    assert (config.momentum, config.weight_decay, config.schedule, config.warmup_epochs) == (
        0.9,
        1e-4,
        [120, 160],
        3,
    )
    assert (config.reducer, config.loss_share, config.refresh_epochs, config.mgd_images) == (
        "amp",
        10,
        "log",
        20_000,
    )
    assert (config.mgd_correction, config.mgd_pooled) == (False, 0.0)
    assert not (config.mlp or config.aug_plus or config.cos or config.teacher or config.resume)


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
def test_a_flag_lands_in_its_field(line, name, value):
    teacher = ["--teacher", "t"] if name in OF_TEACHER else []
    found = getattr(read_config(["DIR", *teacher, *line.split()]), name)
    assert found == value
    assert type(found) is type(value)


def test_every_option_has_a_flag_that_is_tested_here():
    assert {name for _, name, _ in FLAGS} == set(FIELDS) - {"data"}


@pytest.mark.parametrize(
    "argv", [["DIR"], ["--data", "DIR"], ["DIR", "--data", "DIR"], ["--cos", "DIR"], ["--data=DIR"]]
)
def test_the_data_folder_has_a_place_and_a_flag(argv):
    assert read_config(argv).data == "DIR"


@pytest.mark.parametrize("kind", [Config, LinearConfig])
def test_further_folders_are_those_behind_the_first_or_a_file_s(kind, write):
    file = write("data: A\nmore_data: [B, C]\n")
    more = write("more_data: B\n", "more.yaml")
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
def test_each_option_that_is_a_path_is_one_in_which_a_home_folder_is_expanded(kind):
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
def test_a_home_folder_is_expanded_in_each_path(
    home, write, monkeypatch, kind, name, given, expected
):
    expected = expected.format(home=home)
    if name == "config":
        monkeypatch.setattr("job.cli.read_yaml", lambda path, known: {"out": path})
        config = read_config(["DIR", f"--config={given}"], kind=kind)
        assert (config.config, config.out) == ([expected], expected)
        return
    for argv in (
        [f"{flag(name)}={given}"],
        [flag(name), given],
        ["--config", write(f"{name}: {given}\n")],
    ):
        config = read_config([*["DIR"] * (name != "data"), *argv], kind=kind)
        assert getattr(config, name) in (expected, [expected])
    if name == "data":
        assert read_config([given, f"--data={expected}"], kind=kind).data == expected


def test_a_config_file_is_found_at_home(home):
    assert read_config(["DIR", "--config", "~/a.yaml"]).lr == 0.5


@pytest.mark.parametrize(
    "argv",
    [["~nobody-here/x"], ["DIR", "--out=~nobody-here/x"], ["DIR", "--config", "~nobody-here/x"]],
)
def test_a_home_folder_of_nobody_is_one_line(argv):
    message = refused(*argv)
    assert (
        "~nobody-here/x: ~nobody-here has no home folder" in message
        and "write ./~nobody-here/x" in message
    )


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
def test_a_home_folder_is_expanded_in_each_path_of_the_other_programs(
    home, monkeypatch, program, line, expected
):
    found = {}

    def parse(self, argv):
        found.update(vars(argparse.ArgumentParser.parse_args(self, argv)))
        raise RunError("parsed")

    monkeypatch.setattr(Parser, "parse_args", parse)
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(line.split())
    at_home = {
        name: [f"{home}/{part}" for part in value] if isinstance(value, list) else f"{home}/{value}"
        for name, value in expected.items()
    }
    assert {name: found[name] for name in expected} == at_home


def test_an_original_flag_has_an_answer_of_its_own():
    assert set(RETIRED) >= {
        "--dist-url",
        "--dist-backend",
        "--world-size",
        "--rank",
        "--gpu",
        "--start-epoch",
    }
    assert "--multiprocessing-distributed" in RETIRED


@pytest.mark.parametrize("name", sorted(RETIRED))
@pytest.mark.parametrize("form", ["{} 1", "{}=1", "{}"])
def test_a_retired_flag_names_what_to_use(name, form):
    message = refused("DIR", *form.format(name).split(), "--no-such-flag")
    assert name in message
    assert any(
        way in message
        for way in ("horovodrun -np", "--resume auto", "CUDA_VISIBLE_DEVICES", "leave it out")
    )


RELEASED = """
    -a --arch -j --workers --epochs --start-epoch -b --batch-size --lr --learning-rate --momentum
    --wd --weight-decay -p --print-freq --resume --world-size --rank --dist-url --dist-backend
    --seed --gpu --multiprocessing-distributed
"""
SIMSIAM = "--dim --pred-dim --fix-pred-lr"
LINCLS = "-e --evaluate --pretrained --lars"


@pytest.mark.parametrize(("kind", "own"), [(Config, SIMSIAM), (LinearConfig, LINCLS)])
def test_each_flag_of_simsiam_s_released_programs_is_an_option_or_is_answered(kind, own):
    """And means the same, except that their --lr is for a batch of 256."""
    options = {
        name for f in dataclasses.fields(kind) for name in (*f.metadata["flags"], flag(f.name))
    }
    assert {*RELEASED.split(), *own.split()} - options - RETIRED.keys() == set()


def test_the_simsiam_preset_is_the_published_recipe():
    recipe = "--framework simsiam --lr 0.1 --batch-size 512 --epochs 100 --cos --warmup-epochs 0"
    recipe += " --wd 1e-4 --zero-init-residual --aug-plus --fix-pred-lr --dim 2048 --pred-dim 512"
    found = dataclasses.replace(read_config(["DIR", "--config", "simsiam"]), config=[])
    assert found == read_config(["DIR", *recipe.split()])


def test_the_command_line_wins_over_files_and_later_files_over_earlier(write):
    first = write("lr: 0.1\nepochs: 5\nmlp: true\nseed: 1\nschedule: [1, 2]\n", "first.yaml")
    second = write("epochs: 6\nseed: 2\n", "second.yaml")
    config = read_config(
        ["DIR", "--config", first, "--config", second, "--seed", "3", "--no-mlp", "--schedule", "4"]
    )
    assert (config.lr, config.epochs, config.seed, config.mlp, config.schedule) == (
        0.1,
        6,
        3,
        False,
        [4],
    )
    assert config.config == [first, second]


def test_the_command_line_s_folder_wins_over_a_file_s(write):
    path = write("data: elsewhere\n")
    assert read_config(["--config", path]).data == "elsewhere"
    assert read_config(["DIR", "--config", path]).data == "DIR"


def test_defaults_of_one_configuration_are_not_another_s():
    read_config(["DIR"]).schedule.append(7)
    assert read_config(["DIR"]).schedule == [120, 160]


def kind_of(preset):
    """The options of the program that a preset is for."""
    return LinearConfig if preset.startswith("linear") else Config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_name(name):
    path = resources.files("job") / "presets" / f"{name}.yaml"
    written = yaml.safe_load(path.read_text())
    kind = kind_of(name)
    by_name, by_path = (
        read_config(["DIR", f"--config={given}"], kind=kind) for given in (name, path)
    )
    assert written
    assert dataclasses.replace(by_name, config=[]) == dataclasses.replace(by_path, config=[])
    for group, options in written.items():
        assert {key: option(by_name, group, key) for key in options} == options


def option(config, group, key):
    """The value of an option by its key in a group."""
    return getattr(config, groups(type(config))[group].keys[key].name)


def test_there_are_presets_for_imagenet_and_for_a_first_run():
    assert {"imagenet", "original", "small"} <= set(PRESETS)


def test_the_imagenet_preset_is_the_published_recipe():
    recipe = "-a resnet18 --lr 0.03 --batch-size 256 --epochs 200 --mlp --moco-t 0.2 --aug-plus --cos --loss-factor 1e4"
    assert dataclasses.replace(
        read_config(["DIR", "--config", "imagenet"]), config=[]
    ) == read_config(["DIR", *recipe.split()])


def test_the_original_preset_is_the_imagenet_one_with_what_its_authors_code_had():
    imagenet, original = (
        read_config(["DIR", "--config", name]) for name in ("imagenet", "original")
    )
    theirs = dict(
        loss_factor=1e4,
        loss_share=0.0,
        margins="init",
        reducer="amp",
        matching="solved",
        refresh_epochs="log",
    )
    theirs |= dict(mgd_stages=[1, 2, 3, 4], stage_weights=[])
    assert original == dataclasses.replace(imagenet, config=["original"], **theirs)
    line = ["DIR", "--teacher", "t", "--config", "original", "--mgd-stages", "4"]
    assert read_config([*line, "--loss-share", "1"]).loss_share == 1


@pytest.mark.parametrize("recipe", ["small", "imagenet", "simsiam-small"])
def test_the_strongest_preset_changes_only_the_distiller_and_its_strength(recipe):
    line = ["DIR", "--teacher", "t", "--config", recipe]
    expected = dataclasses.replace(
        read_config(line), config=[recipe, "strongest"], distill=["disco"], loss_share=1.0
    )
    assert read_config([*line, "--config", "strongest"]) == expected


LARS = dict(lars=True, batch_size=4096, lr=1.6, momentum=0.9, weight_decay=0.0)
LARS |= dict(epochs=90, cos=True, warmup_epochs=0)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", dict(lars=False, batch_size=256, lr=30.0, epochs=100, cos=False)),
        ("--lars", dict(lars=True, batch_size=256, lr=0.1)),
        ("--lars --batch-size 512", dict(lr=0.2)),
        ("--lars --lr 0.3", dict(lr=0.3)),
        ("--lr 0", dict(lr=0.0)),
        ("--config linear-lars", LARS),
        ("--config linear-lars --batch-size 1024", LARS | dict(batch_size=1024, lr=0.4)),
        ("--config linear-lars --lr 2 --epochs 9", LARS | dict(lr=2.0, epochs=9)),
    ],
)
def test_lars_has_the_published_rate_in_proportion_to_the_batch(line, expected):
    found = dataclasses.asdict(read_config(["DIR", *line.split()], "job.linear", LinearConfig))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "preset", "unknown"),
    [
        (Config, "linear-lars", "classifier"),
        (LinearConfig, "small", "views"),
        (LinearConfig, "simsiam", "method"),
    ],
)
def test_a_preset_of_the_other_program_is_one_line(kind, preset, unknown):
    shown = rf"^--config {preset}: unknown group '{unknown}'; expected one of [\w, ]+$"
    with pytest.raises(RunError, match=shown):
        read_config(["DIR", "--config", preset], kind=kind)


def test_a_preset_and_a_file_go_together(write):
    config = read_config(["DIR", "--config", "small", "--config", write("epochs: 2\n")])
    assert (config.image_size, config.epochs) == (32, 2)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 3e-2", "lr", 0.03),
        ("lr: 1", "lr", 1.0),
        ("loss_factor: 1.0e+4", "loss_factor", 1e4),
        ("epochs: '7'", "epochs", 7),
        ("batch-size: 0x10", "batch_size", 16),
        ("moco_k: 1024", "moco_k", 1024),
        ("mlp: yes", "mlp", True),
        ("cos: off", "cos", False),
        ("schedule: 30", "schedule", [30]),
        ("schedule: [30, '40']", "schedule", [30, 40]),
        ("schedule: []", "schedule", []),
        ("mgd_stages: [4, 3]", "mgd_stages", [3, 4]),
        ("stage_weights: [1, 2.5, '3', 1e2]", "stage_weights", [1.0, 2.5, 3.0, 100.0]),
        ("mgd_stages: 4\nstage_weights: 2", "stage_weights", [2.0]),
        ("refresh_epochs: [0, 5, 10]", "refresh_epochs", "0,5,10"),
        ("refresh_epochs: 5", "refresh_epochs", "5"),
        ("refresh_epochs: every:2", "refresh_epochs", "every:2"),
        ("save_every: 2", "save_every", "2"),
        ("save_every: 50steps", "save_every", "50steps"),
        ("teacher: ''", "teacher", ""),
        ("data: 2020", "data", "2020"),
        ("out: Läufe/é", "out", "Läufe/é"),
    ],
)
def test_a_file_s_value_takes_the_type_of_its_option(write, text, name, value):
    folder = [] if name == "data" else ["DIR"]
    found = getattr(read_config([*folder, "--config", write(text)]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["", "# lr: 0.1\n", "---\n", "{}"])
def test_a_file_of_no_options_changes_none(write, text):
    path = write(text)
    assert read_config(["DIR", "--config", path]) == dataclasses.replace(
        read_config(["DIR"]), config=[path]
    )


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("lr: fast", "lr", "fast", "a number"),
        ("lr: true", "lr", "True", "a number"),
        ("lr: [0.1]", "lr", "0.1", "a number"),
        ("lr: {a: 1}", "lr", "", "one value"),
        ("lr:", "lr", "None", "a number"),
        ("lr: 2020-01-01", "lr", "2020", "a number"),
        ("lr: -0.1", "lr", "-0.1", "at least 0"),
        ("lr: .nan", "lr", "nan", "finite"),
        ("lr: .inf", "lr", "inf", "finite"),
        ("lr: nan", "lr", "nan", "finite"),
        ("lr: 1e999", "lr", "1e999", "finite"),
        ("epochs: 1.5", "epochs", "1.5", "an integer"),
        ("epochs: 1e2", "epochs", "1e2", "an integer"),
        ("epochs: true", "epochs", "True", "an integer"),
        ("epochs: 0", "epochs", "0", "at least 1"),
        ("epochs: [1]", "epochs", "[1]", "an integer"),
        ("mlp: 1", "mlp", "1", "true or false"),
        ("mlp: 'true'", "mlp", "'true'", "true or false"),
        ("mlp: [true]", "mlp", "True", "true or false"),
        ("momentum: 1.0", "momentum", "1.0", "below 1"),
        ("moco_t: 0", "moco_t", "0", "above 0"),
        ("seed: 9223372036854775808", "seed", "9223372036854775808", "below"),
        ("schedule: [1, x]", "schedule", "'x'", "an integer"),
        ("schedule: [1, -2]", "schedule", "-2", "at least 0"),
        ("schedule: true", "schedule", "True", "an integer"),
        ("mgd_stages: [0]", "mgd_stages", "0", "at least 1"),
        ("mgd: {pooled: -1}", "mgd.pooled", "-1", "at least 0"),
        ("mgd: {correction: 2}", "mgd.correction", "2", "true or false"),
        ("mgd_stages: [5]", "mgd_stages", "5", "below 5"),
        ("stage_weights: [1, x, 1, 1]", "stage_weights", "'x'", "a number"),
        ("stage_weights: [1, -1, 1, 1]", "stage_weights", "-1", "at least 0"),
        ("stage_weights: [1, 1, 1, true]", "stage_weights", "True", "a number"),
        ("matching: solve", "matching", "solve", "solved, random"),
        ("arch: resnet51", "arch", "resnet51", "resnet5"),
        ("arch: 50", "arch", "50", "resnet34"),
        ('arch: "res\\nnet"', "arch", "res\\nnet", "resnet"),
        ("arch: [resnet18]", "arch", "resnet18", "text"),
        ("reducer: mean", "reducer", "mean", "amp, rd, sp, sm"),
        ("teacher:", "teacher", "None", "text"),
        ("refresh_epochs: often", "refresh_epochs", "often", "every:N"),
        ("refresh_epochs: every:0", "refresh_epochs", "every:0", "every:N"),
        ("refresh_epochs: [1, x]", "refresh_epochs", "1,x", "0,5,10"),
        ("refresh_epochs: []", "refresh_epochs", "''", "never"),
        ("refresh_epochs: true", "refresh_epochs", "True", "text"),
        ("save_every: 0", "save_every", "'0'", "500steps"),
        ("save_every: 5 steps", "save_every", "5 steps", "500steps"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(write, text, key, value, expected):
    path = write(text)
    message = refused("DIR", "--config", path)
    for part in (path, key, value, expected):
        assert part in message


@pytest.mark.parametrize(
    "text",
    ["lr: 1" + "0" * 400, "lr: " + "9" * 5000, "lr: 2020-13-45", "epochs: " + "9" * 5000],
    ids=[
        "an integer beyond floats",
        "an integer of too many digits",
        "a day that does not exist",
        "many digits",
    ],
)
def test_a_value_that_python_itself_cannot_make_is_one_line(write, text):
    path = write(text)
    assert path in refused("DIR", "--config", path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- lr: 0.1", "a mapping"),
        ("0.03", "a mapping"),
        ("lr", "a mapping"),
        ("\tlr: 0.1", "not YAML"),
        ("lr:\t[", "not YAML"),
        ("lr: [", "not YAML"),
        ("lr: 1\n---\nlr: 2", "not YAML"),
        ("[1]: 2", "one value"),
        ("lr: !!python/object/apply:os.getcwd []", "not YAML"),
        ("cos: !!bool 5", "Leave out the tag"),
        ("lr: !!timestamp x", "Leave out the tag"),
        ('epochs: !!int ""', "Leave out the tag"),
        ("lr: 1\x07", "not YAML"),
        (b"out: caf\xe9", "not YAML"),
        (b"\xff\xfel\x00r\x00:\x00", "not YAML"),
        (b"\x80\x81\x82" * 100, "not YAML"),
    ],
)
def test_a_file_that_holds_no_options_is_one_line(write, text, expected):
    path = write(text)
    message = refused("DIR", "--config", path)
    assert path in message
    assert expected in message


@pytest.mark.parametrize("path", ["no-such-file.yaml", "imagent", "", "."])
def test_a_file_that_is_not_there_is_named_beside_the_presets(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("DIR", "--config", path)
    assert f"--config {path}" in message
    assert ", ".join(PRESETS) in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lrr", "lr"),
        ("batchsize", "batch_size"),
        ("moco-kk", "moco_k"),
        ("teachr", "teacher"),
        ("no_mlp", "mlp"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(write, key, meant):
    path = write(f"lr: 0.1\n{key}: 1\n")
    message = refused("DIR", "--config", path)
    assert path in message
    assert repr(key) in message
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize("key", ["zzzzzz", "1", "null", '"a\\nb"'])
def test_an_unknown_key_like_no_other_is_refused(write, key):
    path = write(f"{key}: 1\n")
    assert path in refused("DIR", "--config", path)


def test_a_file_cannot_name_files_and_is_not_told_to(write):
    message = refused("DIR", "--config", write("config: other.yaml\n"))
    assert "'config'" in message
    assert "did you mean config" not in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr: 0.1\nlr: 0.2", ["lr"]),
        ("lr: 0.1\n'lr': 0.1", ["lr"]),
        ("batch-size: 4\nbatch_size: 8", ["batch-size", "batch_size"]),
        ("moco_k: 4\nmoco: {k: 4}", ["moco_k", "moco.k"]),
        ("moco: {k: 4}\nmoco-k: 4", ["moco.k", "moco-k"]),
        ("moco: {k: 4, moco_k: 4}", ["moco.k", "moco.moco_k"]),
        ("moco: {k: 4, k: 4}", ["moco.k", "leave out"]),
        ("moco: {k: 4}\nmoco: {t: 1}", ["moco", "into one group"]),
        ("data: x\ndata: {image_size: 64}", ["data", "into one group"]),
        ("data: {image_size: 64}\ndata: x", ["data", "into one group"]),
    ],
)
def test_an_option_given_twice_in_a_file_is_an_error_that_names_both_keys(write, text, named):
    message = refused("DIR", "--config", write(text))
    assert "twice" in message
    assert all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message) for part in named), message


@pytest.mark.parametrize(
    ("text", "flat"),
    [
        ("moco: {k: 4096, t: 0.2}", "moco_k: 4096\nmoco_t: 0.2"),
        (
            "mgd: {reducer: rd, stages: [4, 3], images: 9}",
            "reducer: rd\nmgd_stages: [4, 3]\nmgd_images: 9",
        ),
        ("moco: {moco-k: 9, mlp: true}\nlr: 1", "moco_k: 9\nmlp: true\nlr: 1"),
        ("data: {data: x, image_size: 64}", "data: x\nimage_size: 64"),
        ("data: x\nrun: {keep: 5, save-every: 2steps}", "data: x\nkeep: 5\nsave_every: 2steps"),
        (
            "teacher: {teacher: t, arch: resnet50, loss_factor: 7}",
            "teacher: t\nteacher_arch: resnet50\nloss_factor: 7",
        ),
        ("rate: &a {epochs: 3}\nmoco: {}\nseed: 2", "epochs: 3\nseed: 2"),
    ],
)
def test_options_in_groups_are_those_without(write, text, flat):
    grouped, alone = (read_config(["DIR", "--config", write(each)]) for each in (text, flat))
    assert grouped == alone


def test_later_files_win_over_earlier_in_groups_or_without(write):
    files = [
        write("lr: 1\nmoco: {k: 1, t: 1}", "1"),
        write("moco_k: 2\nrate: {lr: 2}", "2"),
        write("moco: {k: 3}", "3"),
    ]
    config = read_config(["DIR", *[f"--config={file}" for file in files], "--moco-t", "4"])
    assert (config.lr, config.moco_k, config.moco_t) == (2, 3, 4)


def test_a_key_of_a_group_and_an_option_is_the_group_s_only_with_a_mapping(write):
    read = [
        read_config(["DIR", "--config", write(text)], kind=LinearConfig)
        for text in ("knn: true", "knn: {k: 3, knn: true}")
    ]
    assert [(config.knn, config.knn_k) for config in read] == [(True, 0), (True, 3)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mocco: {k: 1}", ["unknown group 'mocco'", "did you mean moco?"]),
        ("zzz: {k: 1}", ["unknown group 'zzz'", "expected one of data, run, rate"]),
        ("<<: {lr: 1}", ["unknown group '<<'"]),
        ("moco: {kk: 1}", ["unknown key 'moco.kk'", "did you mean moco.k?"]),
        ("mgd: {stage: [1]}", ["unknown key 'mgd.stage'", "did you mean mgd.stages?"]),
        ("moco: {lr: 1}", ["unknown key 'moco.lr'", "did you mean rate.lr?"]),
        ("rate: {k: 1}", ["unknown key 'rate.k'", "did you mean knn.k or similarity.k or moco.k?"]),
        ("MoCo: {k: 1}", ["unknown group 'MoCo'", "did you mean moco?"]),
        ("moco: {K: 1}", ["unknown key 'moco.K'", "did you mean moco.k?"]),
        ("moco: !!set {k: 1}", ["moco", "a mapping without a tag"]),
        ("!!set {lr: 1}", ["a mapping without a tag"]),
        ("moco.k: 5", ["unknown key 'moco.k'", "did you mean moco_k?"]),
        ("run: {config: x.yaml}", ["unknown key 'run.config'"]),
        ("moco: 5", ["moco", "expected a mapping, as in `moco: {dim: ...}`"]),
        ("moco:", ["moco", "expected a mapping", "the group is empty"]),
        ("run: [1]", ["run", "expected a mapping"]),
        ("moco: {k: {a: 1}}", ["moco.k", "expected one value"]),
        ("moco: &a {k: *a}", ["moco.k", "expected one value"]),
        ("moco: {[1]: 2}", ["expected one value"]),
        ("mgd: {stages: [[1]]}", ["mgd.stages", "expected one value"]),
        ("moco: {k: 0}", ["moco.k 0: expected at least 1"]),
        ("moco: {moco_k: fast}", ["moco.moco_k 'fast': expected an integer"]),
        ("run: {save-every: 0}", ["run.save-every '0': expected", "500steps"]),
        ("moco: {k: !!bool 5}", ["Leave out the tag"]),
    ],
)
def test_a_wrong_group_is_named_with_its_file_and_its_dotted_key(write, text, parts):
    path = write(text)
    message = refused("DIR", "--config", path)
    assert all(part in message for part in (path, *parts)), message


def test_anchors_stand_for_values_and_for_lists_of_them(write):
    config = read_config(
        ["DIR", "--config", write("lr: &x 2\nepochs: *x\nschedule: &y [*x, 3]\nmgd_stages: *y\n")]
    )
    assert (config.lr, config.epochs, config.schedule, config.mgd_stages) == (
        2.0,
        2,
        [2, 3],
        [2, 3],
    )


@pytest.mark.parametrize(
    "text",
    [
        "schedule: [[1]]",
        "schedule: &a [*a]",
        "lr: &a {<<: *a}",
        "mgd_stages: &a [1]\nschedule: [*a, *a]",
    ],
)
def test_lists_in_lists_are_refused(write, text):
    """So nothing grows: aliases of aliases could stand for more than any memory holds."""
    assert "expected one value, or a list of values" in refused("DIR", "--config", write(text))


@pytest.mark.parametrize(
    "text",
    ["lr: " + "[" * 60_000, "lr: " + "x" * 60_000, "# " + "x" * 2**16],
    ids=["deep", "wide", "long"],
)
def test_a_file_of_any_content_is_a_short_line(write, text):
    assert len(refused("DIR", "--config", write(text))) <= 1010


def test_a_schedule_beside_cos_is_refused_only_where_the_command_line_asks_for_it(write):
    path = write("cos: true\nschedule: [1]\n")
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
def test_the_last_of_a_factor_and_a_share_decides(tmp_path, texts, flags, share, factor):
    """A file with both, as a run's config.yaml, has a share that decides where it is above 0."""
    given = ["--teacher", "t", *flags.split()]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        given += ["--config", str(tmp_path / f"{number}.yaml")]
    config = read_config(["DIR", *given])
    assert config.loss_share == share and factor in (None, config.loss_factor)


def test_a_factor_beside_a_share_is_refused_where_the_command_line_asks_for_both():
    message = refused("DIR", "--loss-factor=2", "--loss-share", 0.1)
    assert (
        "--loss-factor" in message and "--loss-share 0.1" in message and "leave out one" in message
    )


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
def test_weights_that_do_not_fit_the_stages_or_the_distillers_are_refused(options, parts):
    message = refused("DIR", *options.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("options", ["--mgd-stages 4 2 4", "--mgd-stages 2 4 --stage-weights 0 1"])
def test_stages_of_any_order_are_fine_without_weights_and_in_their_order_with(options):
    assert read_config(["DIR", "--teacher", "t", *options.split()]).mgd_stages == [2, 4]


@pytest.mark.parametrize(("matching", "epochs"), [("random", "never"), ("solved", "every:2")])
def test_a_random_matching_has_no_refreshes_and_whoever_reads_the_options_sees_none(
    matching, epochs, write
):
    path = write("refresh_epochs: every:2")
    config = read_config(["DIR", "--teacher", "t", "--config", path, "--matching", matching])
    assert dataclasses.asdict(config)["refresh_epochs"] == epochs


def test_refreshes_beside_a_random_matching_are_refused_where_the_command_line_asks_for_them(write):
    path = write("matching: random\n")
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
def test_an_option_of_a_part_not_chosen_is_an_error_on_the_command_line_only(
    write,
    monkeypatch,
    line,
    shown,
):
    monkeypatch.setitem(DISTILLERS, "toy", Distiller)
    choice, value = line.split()[:2]
    given = ["DIR", "--teacher", "t"]
    message = refused(*given, *line.split())
    assert message.startswith(f"{shown}: no effect with {choice} {value}"), message
    assert read_config([*given, "--no-mlp", choice, value]).mlp is False  # as by default
    path = write("moco: {k: 5, mlp: false}\nmgd: {images: 5, reducer: rd}")
    assert read_config([*given, "--config", path, choice, value]).moco_k == 5


def test_a_k_without_k_nn_accuracies_is_an_error_on_the_command_line_only(write):
    reason = "no effect without --knn-every; leave it out, or add --knn-every 1"
    assert refused("DIR", "--knn-k", 5) == f"--knn-k 5: {reason}"
    assert read_config(["DIR", "--knn-k", "0"]).knn_k == 0  # as by default
    assert read_config(["DIR", "--config", write("knn: {k: 5}")]).knn_k == 5
    assert read_config(["DIR", "--config", write("knn: {every: 1}"), "--knn-k", "5"]).knn_k == 5


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
def test_an_option_of_the_teacher_without_a_teacher_is_an_error(write, name):
    value = WITH_TEACHER[name]
    words = words_of(name, value)
    reason = "no effect without --teacher; leave it out, or add --teacher FILE"
    assert refused("DIR", *words) == refused("DIR", *words, "--resume", "auto")
    assert refused("DIR", *words) == f"{' '.join(words)}: {reason}"
    path = write(yaml.safe_dump({name: value}))
    assert getattr(read_config(["DIR", "--config", path]), name) == value
    if default := getattr(Config(), name):
        assert read_config(["DIR", *words_of(name, default)]) == read_config(["DIR"])


@pytest.mark.parametrize("line", ["--loss-ramp", "--distill gram --gram-tau 2", "--teacher-size 9"])
def test_a_teacher_in_a_file_or_in_the_place_of_a_checkpoint_is_one(write, line):
    """The original's --resume names the teacher's file."""
    path = write("teacher: t\n")
    for teacher in (["--config", path], ["--resume", "t.pth.tar"]):
        assert read_config(["DIR", *teacher, *line.split()])


@pytest.mark.parametrize("setting", ["headless", "seed"])
def test_a_momentum_without_a_momentum_encoder_is_an_error(setting):
    line = ["DIR", "--teacher", "t", "--distill", "similarity", "--similarity", setting]
    line += ["--similarity-m", "0.9"]
    message = refused(*line)
    assert message.startswith(f"--similarity-m 0.9: no effect with --similarity {setting}")
    assert read_config([*line[:-1], "0.999"]).similarity_m == 0.999  # as by default
    message = refused("DIR", "--teacher", "t", "--similarity-m", "0.9")
    assert message.startswith("--similarity-m 0.9: no effect with --distill mgd; ")


def test_an_option_of_one_part_of_several_has_an_effect(monkeypatch):
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
def test_a_head_s_width_without_a_head_that_has_a_hidden_layer_is_an_error(line, fix):
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
def test_a_wrong_command_line_is_one_line(line, parts):
    message = refused(*line.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "line",
    [
        "--data DIR",
        "--data DIR --config imagenet --teacher t.pth.tar --out runs/a --resume auto",
        "--data DIR --config small --no-cos --schedule 1 2 --save-every 7steps --lr 1e-5",
        "--data DIR --teacher t --mgd-stages 2 4 --refresh-epochs 0,5",
        "--data DIR --teacher t --mgd-stages 2 4 --stage-weights 0 1e-3 --loss-share 0.05",
        "--data DIR --teacher t --loss-ramp --matching random",
        "--data caf\udce9 --no-mlp --seed 9223372036854775807 --teacher t --loss-factor 1e300",
    ],
)
def test_options_written_to_a_file_read_back_the_same(write, line):
    config = read_config(line.split())
    options = dataclasses.asdict(config)
    del options["config"]
    path = write(yaml.safe_dump(options, sort_keys=False))
    assert dataclasses.replace(read_config(["--config", path]), config=config.config) == config


@pytest.mark.parametrize("kind", [Config, LinearConfig])
def test_help_has_every_option_once_in_the_section_of_its_group(capsys, kind):
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
def test_a_run_has_a_folder_of_its_own(line, folder):
    assert read_config(line.split()).folder() == folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distill": "projector"}, "--distill 'projector': expected a list"),
        ({"mgd_stages": 4}, "--mgd-stages 4: expected a list"),
        ({"log_to": "wandb"}, "--log-to 'wandb': expected a list"),
        ({"mgd_stages": [[4]]}, "--mgd-stages [4]: expected an integer"),
        ({"stage_weights": ["a"]}, "--stage-weights 'a': expected a number"),
    ],
)
def test_a_list_from_python_must_be_one(options, expected):
    with pytest.raises(RunError) as caught:
        Config(data="DIR", **options)
    assert str(caught.value) == expected


def test_lists_of_a_classifier_from_python_must_be_some():
    with pytest.raises(RunError, match=r"^--schedule 60: expected a list$"):
        LinearConfig(data="DIR", schedule=60)
