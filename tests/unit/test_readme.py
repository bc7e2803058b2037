"""The pages' examples run, and the program has the messages that they quote."""

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
# Quoted texts of the log and of NCCL, not messages of the program.
ELSEWHERE = ("data wait", "unable to allocate shared memory")
SHOWN = """
import sys
assert "horovod" not in sys.modules and "timm" not in sys.modules
job = {name for name in sys.modules if name.startswith("job")}
job = {name for name in job if not name.startswith("job.networks.")}
assert job <= {"job", "job.networks", "job.declare", "job.errors", "job.files", "job.text"}, job
start = MGDistiller({i: (widths[i].num_features, norms[i].num_features) for i in norms})
print("solved", *[not torch.equal(distiller.matching(i), start.matching(i)) for i in norms])
"""


@functools.cache
def strings() -> str:
    """Return all strings of the program except docstrings, and all code lines of the scripts."""
    folders = ("job", "mgd", "moco", "slurm", "docker")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    texts = []
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
                    texts.append(
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
                    texts.append(node.value)
        elif path.suffix in (".sh", ".sbatch"):
            texts += [
                line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
            ]
    return "\n".join(texts)


def messages(page, title):
    """Return the messages that a page's list of troubles quotes before each colon."""
    text = " ".join(pages.section(page, title).split())
    heads = re.findall(r"- ((?:`[^`]+`|[^`:])+): ", text)
    quoted = [text for head in heads for text in re.findall(r"`([^`]+)`", head)]
    return [text for text in quoted if text not in ELSEWHERE and " " in text]


MESSAGES = messages("job/README.md", "## Troubleshooting")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The output of the example of mgd/README.md."""
    script = tmp_path_factory.mktemp("example") / "example.py"
    script.write_text("import torch; torch.manual_seed(1)\n" + EXAMPLE + SHOWN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_example_reduces_the_distillation_loss(example):
    losses = [float(loss) for loss in re.findall(r"distillation (\S+)$", example, re.MULTILINE)]
    assert len(losses) > 2 and losses[-1] < losses[0]


@pytest.mark.slow
def test_example_solves_a_matching_in_every_stage(example):
    assert example.splitlines()[-1] == "solved True True True True"


@pytest.mark.slow
@pytest.mark.short
def test_call_from_python_returns_its_numbers(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "call.py").write_text(CALL)
    command = [sys.executable, "call.py"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = re.findall(r"^step ([\d.]+)$", done.stdout, re.MULTILINE)
    checkpoint, loss, knn = done.stdout.splitlines()[-1].split()
    assert (checkpoint, loss) == ("runs/python/last.pth.tar", last)
    assert float(knn) > 20  # of 10 classes


def test_troubleshooting_quotes_many_messages():
    assert len(MESSAGES) > 30


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_quotes_the_program(message):
    assert message in strings()


def test_readme_quotes_five_of_these_messages():
    quoted = messages("README.md", "## Troubles")
    assert len(quoted) == 5 and set(quoted) <= set(MESSAGES)


def test_picture_of_mgd_watch_has_its_rows(tmp_path):
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


def test_reported_cases_name_existing_tests():
    path = ""
    for file, name in re.findall(
        r"`([\w/]+\.py)?(?:::(\w+))?`", (ROOT / "tests/README.md").read_text()
    ):
        path = file or path
        source = (ROOT / "tests" / path).read_text()
        assert not name or f"def {name}(" in source, f"{path}::{name}"
