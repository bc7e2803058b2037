"""Properties of options in files and flags: they read back the same, and wrong ones are named."""

import dataclasses
from dataclasses import fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from job.config import (
    Config,
    LinearConfig,
    read_config,
    without_head,
    without_knn,
    without_part,
    without_teacher,
)
from job.errors import RunError
from job.declare import flag, groups
from job.distill import DISTILLERS

# No command line can have \0. By default `characters` gives no surrogates.
CHARACTERS = st.characters(exclude_characters="\0")
VALUES = {  # where the declaration does not suffice, or another option forbids some values
    "refresh_epochs": st.sampled_from(["log", "never"])
    | st.integers(1, 999).map("every:{}".format)
    | st.lists(st.integers(0, 300), min_size=1, max_size=4).map(
        lambda epochs: ",".join(map(str, epochs))
    ),
    "save_every": st.builds("{}{}".format, st.integers(1, 10_000), st.sampled_from(["", "steps"])),
    "data": st.text(CHARACTERS, min_size=1, max_size=20).filter(
        lambda path: not path.startswith("~")
    ),
    "log_to": st.lists(st.sampled_from(["wandb", "mlflow", "a.b:c"]), min_size=1, max_size=3),
    "more_data": st.just([]),  # --data drops it
    "cos": st.just(False),  # with it, --schedule is refused
    "loss_share": st.just(0.0),  # with it, --loss-factor is refused
    "weak_views": st.just(False),  # with it, --aug-plus is refused
    "matching": st.just("solved"),  # with `random`, --refresh-epochs is refused
    "similarity": st.just("compress"),  # with another, --similarity-m is refused
    "distill": st.permutations(list(DISTILLERS)),
    "stage_weights": st.just([]),  # as many as stages: in a separate test
    "distill_weights": st.just([]),  # as many as distillers
    "knn": st.just(False),  # with it, --evaluate, --resume, --log-to, --tensorboard are refused
    "evaluate": st.just(False),  # with it, --log-to and --tensorboard are refused
}


def values(f):
    """Return a strategy of the values that an option's declaration allows."""
    meta = f.metadata
    if f.name in VALUES:
        return VALUES[f.name]
    if meta["choices"]:
        return st.sampled_from(list(meta["choices"]))
    if f.type is bool:
        return st.booleans()
    if f.type in (int, list[int]):
        low = meta["at_least"] if meta["at_least"] is not None else -(10**20)
        high = meta["below"] - 1 if meta["below"] is not None else meta["at_most"]
        unit = meta["multiple_of"] or 1
        high = 10**20 if high is None else high
        integers = st.integers(-(-low // unit), high // unit).map(lambda n: n * unit)
        return integers if f.type is int else st.lists(integers, min_size=1, max_size=5)
    if f.type is float:
        low = meta["at_least"] if meta["at_least"] is not None else meta["above"]
        high = meta["below"] if meta["below"] is not None else meta["at_most"]
        exclude = {
            "exclude_min": meta["above"] is not None,
            "exclude_max": meta["below"] is not None,
        }
        return st.floats(low, high, allow_nan=False, allow_infinity=False, **exclude)
    # A path that starts with ~ would change.
    return st.text(CHARACTERS, max_size=20).filter(
        lambda text: not (meta["path"] and text.startswith("~"))
    )


def configs(kind):
    return st.builds(kind, **{f.name: values(f) for f in fields(kind) if f.name != "config"})


def unused(config):
    """Return the options without effect: a file may have them, a command line may not."""
    if isinstance(config, LinearConfig):
        return {"knn_k"}  # without --knn
    names = {*without_part(config), *without_head(config), *without_teacher(config)}
    return names | {*without_knn(config)}


def without_unused(config):
    """Return a configuration with the defaults of its unused options."""
    default = type(config)()
    return dataclasses.replace(config, **{name: getattr(default, name) for name in unused(config)})


both = pytest.mark.parametrize(
    ("program", "kind"), [("job.train", Config), ("job.linear", LinearConfig)]
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("options") / "options.yaml"


def without_config(config):
    """Return a configuration's options except --config, which a file cannot have."""
    return {name: value for name, value in vars(config).items() if name != "config"}


def in_groups(options, kind, random):
    """Return options, some of them in their groups, under one of their keys."""
    grouped = {}
    for name, group in groups(kind).items():
        members = [each for each in group.options if each in options]
        inside = {each for each in members if random.random() < 0.7}
        if inside:
            inside |= {name} & set(members)  # option `data` and group `data` would be one key twice
        for option in members:
            keys = [key for key, f in group.keys.items() if f.name == option]
            if option in inside:
                grouped.setdefault(name, {})[random.choice(keys)] = options[option]
            else:
                grouped[option] = options[option]
    return grouped


@both
@given(data=st.data())
def test_options_in_a_file_read_back_the_same(program, kind, file, data):
    config = data.draw(configs(kind))
    options = without_config(config)
    if data.draw(st.booleans()):
        options = in_groups(options, kind, data.draw(st.randoms(use_true_random=False)))
    file.write_text(yaml.safe_dump(options, sort_keys=data.draw(st.booleans())), encoding="utf-8")
    expected = dataclasses.replace(config, config=[str(file)])
    assert read_config(["--config", str(file)], program, kind) == expected


def command_line(config):
    """Yield the arguments of a command line with all options of a configuration."""
    for name, value in dataclasses.asdict(config).items():
        if name == "loss_factor" and config.loss_share:
            continue  # refused with --loss-share
        if isinstance(value, bool):
            yield flag(name) if value else "--no-" + flag(name).removeprefix("--")
        elif isinstance(value, list):
            yield from [flag(name), *map(str, value)] if value else []
        else:
            yield f"{flag(name)}={value}"


@both
@given(data=st.data())
def test_options_as_flags_read_back_the_same(program, kind, data):
    config = without_unused(data.draw(configs(kind)))
    assert read_config(list(command_line(config)), program, kind) == config


@both
@given(data=st.data())
def test_flag_wins_over_a_file(program, kind, file, data):
    """It changes no other option."""
    config = data.draw(configs(kind))
    left_out = {"config", *unused(config)}
    chosen = data.draw(st.sampled_from([f for f in fields(kind) if f.name not in left_out]))
    value = data.draw(values(chosen))
    file.write_text(yaml.safe_dump(without_config(config)), encoding="utf-8")
    expected = dataclasses.replace(config, **{chosen.name: value, "config": [str(file)]})
    flags = [
        part
        for part in command_line(expected)
        if part.split("=")[0] in (flag(chosen.name), no(chosen.name))
    ]
    if isinstance(value, list):
        flags = [flag(chosen.name), *map(str, value)] if value else []
    assert read_config(["--config", str(file), *flags], program, kind) == expected


@given(data=st.data())
def test_stage_weights_and_loss_share_read_back(file, data):
    stages = data.draw(st.lists(st.integers(1, 4), min_size=1, unique=True).map(sorted))
    weight = st.floats(0, allow_infinity=False)
    weights = data.draw(st.lists(weight, min_size=len(stages), max_size=len(stages)).filter(any))
    share = data.draw(weight)
    file.write_text(
        yaml.safe_dump({"mgd_stages": stages, "stage_weights": weights, "loss_share": share}),
        encoding="utf-8",
    )
    flags = [
        flag("mgd_stages"),
        *map(str, stages),
        flag("stage_weights"),
        *map(str, weights),
        f"{flag('loss_share')}={share}",
    ]
    for argv in (["--config", str(file)], flags):
        config = read_config(["--data=x", "--teacher=t", *argv])
        assert (config.mgd_stages, config.stage_weights) == (stages, weights)
        assert config.loss_share == share


@pytest.mark.parametrize(
    "line",
    [
        "--data DIR --config imagenet --teacher t.pth.tar --out runs/a --resume auto",
        "--data DIR --teacher t --loss-ramp --matching random",
        "--data caf\udce9 --no-mlp --seed 9223372036854775807 --teacher t --loss-factor 1e300",
    ],
)
def test_options_of_flags_read_back_from_a_file(file, line):
    """Presets, options that the strategies above leave out, and surrogates."""
    config = read_config(line.split())
    file.write_text(yaml.safe_dump(without_config(config), sort_keys=False))
    assert dataclasses.replace(read_config(["--config", str(file)]), config=config.config) == config


def no(name):
    return "--no-" + flag(name).removeprefix("--")


BOUNDED = [
    (kind, f, bound, beyond)
    for kind in (Config, LinearConfig)
    for f in fields(kind)
    for bound, beyond in (("at_least", -1), ("above", 0), ("below", 0), ("at_most", 1))
    if f.metadata[bound] is not None
]


@pytest.mark.parametrize("kind", [Config, LinearConfig])
@given(number=st.integers(16, 512).filter(lambda number: number % 16))
def test_number_that_is_no_multiple_is_named(kind, number):
    with pytest.raises(RunError, match=f"--width {number}: expected a multiple of 16$"):
        read_config(["--data=x", f"--width={number}"], kind=kind)


@given(data=st.data())
def test_number_beyond_its_bound_is_named(data):
    kind, f, bound, direction = data.draw(st.sampled_from(BOUNDED))
    limit, far = f.metadata[bound], data.draw(st.integers(1, 10**9))
    sign = -1 if bound in ("at_least", "above") else 1
    value = limit if direction == 0 and data.draw(st.booleans()) else limit + sign * far
    with pytest.raises(RunError) as caught:
        read_config(["--data=x", f"{flag(f.name)}={value}"], kind=kind)
    message = str(caught.value)
    parts = (flag(f.name), f"{bound.replace('_', ' ')} {limit}")
    assert all(part in message for part in parts) and "\n" not in message
