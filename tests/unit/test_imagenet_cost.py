"""Costs and commands of full runs on the presets' page match the programs."""

import re
from pathlib import Path

import pytest

import cost
import pages
from job.config import Config, LinearConfig, read_config

ROOT = Path(__file__).parents[2]
SECTION = pages.section("job/presets/README.md", "## Costs of a run")
CONFIGS = {"train": Config, "linear": LinearConfig}


def commands():
    """Return the section's commands, as lists of arguments, with the value of `$names`."""
    text = SECTION.replace("\\\n", " ")
    [names] = re.findall(r"^    names=(\S+)$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [line.replace("$names", names).split() for line in lines if "names=" not in line]


def test_table_equals_the_script_s():
    lines = [line for line in SECTION.splitlines() if line.startswith("| ")][1:]
    assert lines == [f"| {' | '.join(row)} |" for row in cost.rows(cost.RATE)]


def test_recipe_needs_34_hours():
    config = read_config(["DIR", "--config", "imagenet"])
    assert round(cost.hours(config, 1.0, 1.0, 2100)) == 34


def test_cost_follows_views_and_networks():
    def work(command):
        return cost.passes(read_config(["DIR", *command.split()]), 1.0, 10.0)

    teacher = "--teacher FILE"
    assert work("") == {"student": 3, "keys": 1}
    assert work(teacher) == {"student": 3, "keys": 1, "teacher": 10}
    assert work(f"--distill disco {teacher}") == {"student": 6, "keys": 1, "teacher": 20}
    assert work("--framework simsiam") == {"student": 6}
    assert work(f"--framework simsiam {teacher}") == {"student": 6, "teacher": 20}
    assert work(f"--framework simsiam --mgd-views 1 {teacher}")["teacher"] == 10
    none = f"--framework none --distill similarity {teacher}"
    assert work(none) == {"student": 3, "teacher": 10}
    assert work(f"{none} --similarity compress") == {"student": 3, "teacher": 10, "copy": 1}


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_commands_have_known_options(command):
    if command[0] == "horovodrun":
        program = command[command.index("-m") + 1].removeprefix("job.")
        given = command[command.index("-m") + 2 :]
    else:
        [at] = [n for n, argument in enumerate(command) if argument.endswith(".sbatch")]
        program, given = Path(command[at]).stem, ["DIR", *command[at + 1 :]]
        script = (ROOT / command[at]).read_text()
        own = dict(argument.split("=", 1) for argument in command[1:at])
        assert own.keys() <= set(re.findall(r"^#SBATCH (--[\w-]+)=", script, re.MULTILINE))
        names = [pair.split("=")[0] for pair in own["--export"].split(",") if "=" in pair]
        assert all(f'"${{{name}' in script for name in names)
        if program == "train":
            given[1:1] = ["--config", "imagenet"]
    config = read_config(given, f"job.{program}", CONFIGS[program])
    nodes = 4 if "--nodes=4" in command else 1
    assert config.batch_size % (8 * nodes) == 0 and config.precision == "bf16"
    if program == "train":
        assert config.lr / config.batch_size == pytest.approx(0.03 / 256)


def test_section_has_host_and_node_commands():
    assert [command[0] for command in commands()] == ["horovodrun"] * 2 + ["sbatch"] * 2
