"""The examples of the pages run, and the messages that they quote are the program's."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pages
from tests.unit.show.test_watch import watch, write_run

ROOT = Path(__file__).parents[2]
[CALL] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# tests/unit/test_packages.py runs the first example of this page.
_, EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "mgd/README.md").read_text(), re.DOTALL)
ELSEWHERE = (
    "data wait",
    "unable to allocate shared memory",
)  # a number in the log, and NCCL's own words
SHOWN = """
import sys
assert "horovod" not in sys.modules and "timm" not in sys.modules
job = {name for name in sys.modules if name.startswith("job") and not name.startswith("job.networks.")}
assert job <= {"job", "job.networks", "job.declare", "job.errors", "job.files", "job.text"}, job
start = MGDistiller({i: (widths[i].num_features, norms[i].num_features) for i in norms})
print("solved", *[not torch.equal(distiller.matching(i), start.matching(i)) for i in norms])
"""


@functools.cache
def strings() -> str:
    """All strings of the program except docstrings, a line each; of the shell scripts, the lines without comments."""
    files = [
        path
        for part in ("job", "mgd", "moco", "slurm", "docker")
        for path in (ROOT / part).rglob("*")
    ]
    found = []
    for path in files:
        if path.suffix == ".py":
            tree = ast.parse(path.read_text())
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            parts = {
                id(part)
                for node in ast.walk(tree)
                if isinstance(node, ast.JoinedStr)
                for part in node.values
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            part.value if isinstance(part, ast.Constant) else "{}"
                            for part in node.values
                        )
                    )
                elif (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in docs | parts
                ):
                    found.append(node.value)
        elif path.suffix in (".sh", ".sbatch"):
            found += [
                line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
            ]
    return "\n".join(found)


def messages(page, title):
    """Return the words of the program that a page's list of troubles quotes before each colon."""
    text = " ".join(pages.section(page, title).split())
    heads = re.findall(r"- ((?:`[^`]+`|[^`:])+): ", text)
    quoted = [words for head in heads for words in re.findall(r"`([^`]+)`", head)]
    return [words for words in quoted if words not in ELSEWHERE and " " in words]


MESSAGES = messages("job/README.md", "## Troubleshooting")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    script = tmp_path_factory.mktemp("example") / "example.py"
    script.write_text("import torch; torch.manual_seed(1)\n" + EXAMPLE + SHOWN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_example_pulls_the_student_towards_its_teacher(example):
    losses = [float(found) for found in re.findall(r"distillation (\S+)$", example, re.MULTILINE)]
    assert len(losses) > 2 and losses[-1] < losses[0]


@pytest.mark.slow
def test_example_solves_a_matching_in_every_stage(example):
    assert example.splitlines()[-1] == "solved True True True True"


@pytest.mark.slow
def test_the_call_from_python_trains_and_returns_its_numbers(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "call.py").write_text(CALL)
    command = [sys.executable, "call.py"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = re.findall(r"^step ([\d.]+)$", done.stdout, re.MULTILINE)
    told = done.stdout.splitlines()[-1].split()
    assert told[:2] == ["runs/python/last.pth.tar", last] and float(told[2]) > 20  # of 10 classes


def test_troubleshooting_quotes_many_messages():
    assert len(MESSAGES) > 60


@pytest.mark.parametrize("words", MESSAGES)
def test_troubleshooting_quotes_the_program(words):
    assert words in strings()


def test_readme_s_troubles_are_five_of_these():
    found = messages("README.md", "## Troubles")
    assert len(found) == 5 and set(found) <= set(MESSAGES)


def test_the_picture_of_watching_has_the_rows_of_mgd_watch(tmp_path):
    folder = write_run(tmp_path / "run")
    more = [
        {"epoch": 1, "step": 0, "knn": 80.0},
        {"epoch": 1, "step": 0, "stage": 4, "changed": 0.5, "cost_after": 1.0},
        {
            "epoch": 1,
            "step": 0,
            "steps": 10,
            "feature_std": 0.6,
            "queue_rank": 6.5,
            "dead_layer4": 0.0,
        },
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in more)
    picture = pages.section("job/show/README.md", "## In a terminal")
    picture = picture.split("    runs/demo/mgd: done\n")[1].split("\nA run of")[0]
    documented, shown = (
        re.findall(rf"^ {{{indent}}}(\S+)", text, re.MULTILINE)
        for indent, text in ((6, picture), (2, watch(folder).stdout))
    )
    assert len(documented) > 8 and documented == shown


def test_the_tests_of_reported_cases_are_there():
    path = ""
    for file, name in re.findall(
        r"`([\w/]+\.py)?(?:::(\w+))?`", (ROOT / "tests/README.md").read_text()
    ):
        path = file or path
        source = (ROOT / "tests" / path).read_text()
        assert not name or f"def {name}(" in source, f"{path}::{name}"
