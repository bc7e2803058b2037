"""The presets of job/presets."""

import dataclasses
import shlex
from importlib import resources

import pytest
import yaml

import runs
from job.config import OF_TEACHER, Config, LinearConfig, read_config
from job.declare import groups
from job.errors import RunError

FILES = (resources.files("job") / "presets").iterdir()
PRESETS = sorted(file.name.removesuffix(".yaml") for file in FILES if file.name.endswith(".yaml"))


def kind_of(preset):
    """Return the options of the program that a preset is for."""
    return LinearConfig if preset.startswith("linear") else Config


def option(config, group, key):
    """Return the value of an option by its key in a group."""
    return getattr(config, groups(type(config))[group].keys[key].name)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_by_name_equals_its_file(name):
    path = resources.files("job") / "presets" / f"{name}.yaml"
    written = yaml.safe_load(path.read_text())
    kind = kind_of(name)
    by_name, by_path = (read_config(["DIR", f"--config={c}"], kind=kind) for c in (name, path))
    assert written
    assert dataclasses.replace(by_name, config=[]) == dataclasses.replace(by_path, config=[])
    for group, options in written.items():
        assert {key: option(by_name, group, key) for key in options} == options


MOCO = "-a resnet18 --lr 0.03 --batch-size 256 --epochs 200 --mlp --moco-t 0.2 --aug-plus --cos"
SIMSIAM = "--framework simsiam --lr 0.1 --batch-size 512 --epochs 100 --cos --warmup-epochs 0"
SIMSIAM += " --wd 1e-4 --zero-init-residual --aug-plus --fix-pred-lr --dim 2048 --pred-dim 512"


@pytest.mark.parametrize(
    ("preset", "recipe"), [("imagenet", f"{MOCO} --loss-factor 1e4"), ("simsiam", SIMSIAM)]
)
def test_preset_is_the_published_recipe(preset, recipe):
    config = dataclasses.replace(read_config(["DIR", "--config", preset]), config=[])
    assert config == read_config(["DIR", *recipe.split()])


def test_original_preset_changes_only_mgd():
    """It is the preset imagenet with the settings of MGD's own program."""
    imagenet, original = (read_config(["DIR", "--config", c]) for c in ("imagenet", "original"))
    settings = dict(loss_factor=1e4, loss_share=0.0, margins="init", reducer="amp")
    settings |= dict(matching="solved", refresh_epochs="log")
    settings |= dict(mgd_stages=[1, 2, 3, 4], stage_weights=[])
    assert original == dataclasses.replace(imagenet, config=["original"], **settings)
    line = ["DIR", "--teacher", "t", "--config", "original", "--mgd-stages", "4"]
    assert read_config([*line, "--loss-share", "1"]).loss_share == 1


@pytest.mark.parametrize("recipe", ["small", "imagenet", "simsiam-small"])
def test_strongest_preset_changes_only_the_distiller(recipe):
    """And the distillation strength."""
    line = ["DIR", "--teacher", "t", "--config", recipe]
    expected = dataclasses.replace(
        read_config(line), config=[recipe, "strongest"], distill=["disco"], loss_share=1.0
    )
    assert read_config([*line, "--config", "strongest"]) == expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("teacher", [[], ["--teacher", "t"]])
def test_shown_options_of_a_preset_repeat_the_run(name, teacher):
    """Without a teacher they lack the preset's options of teachers."""
    kind = kind_of(name)
    if kind is LinearConfig and teacher:
        pytest.skip("no teacher in job.linear")
    config = read_config(["DIR", "--config", name, *teacher], kind=kind)
    again = read_config(shlex.split(runs.shown_options(config)), kind=kind)
    default = Config()
    of_teacher = {} if teacher else {each: getattr(default, each) for each in OF_TEACHER}
    changed = of_teacher if kind is Config else {}
    assert again == dataclasses.replace(config, config=[], **changed)


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
def test_lars_rate_is_in_proportion_to_the_batch(line, expected):
    options = dataclasses.asdict(read_config(["DIR", *line.split()], "job.linear", LinearConfig))
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "preset", "unknown"),
    [
        (Config, "linear-lars", "classifier"),
        (LinearConfig, "small", "views"),
        (LinearConfig, "simsiam", "method"),
    ],
)
def test_preset_of_the_other_program_is_refused(kind, preset, unknown):
    shown = rf"^--config {preset}: unknown group '{unknown}'; expected one of [\w, ]+$"
    with pytest.raises(RunError, match=shown):
        read_config(["DIR", "--config", preset], kind=kind)


def test_preset_and_file_combine(write_yaml):
    config = read_config(["DIR", "--config", "small", "--config", write_yaml("epochs: 2\n")])
    assert (config.image_size, config.epochs) == (32, 2)
