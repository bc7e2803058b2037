"""The files for GitHub and pre-commit: valid, and consistent with .ci/run and the code."""

import importlib
import re
import subprocess
import sys
import tomllib
from types import ModuleType

import pytest
import yaml

import pages
from job import __version__
from job.distill import DISTILLERS, Distiller
from pages import ROOT

FILES = [
    *(ROOT / ".github").rglob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
    ROOT / ".github" / "CITATION.cff",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(path):
    """Return the content of a YAML file, by its path from the root."""
    return yaml.safe_load((ROOT / path).read_text())


def test_files_are_yaml():
    assert len(FILES) == 6 and all(isinstance(read(path), dict) for path in FILES)


def test_workflow_calls_ci_run():
    workflow = read(".github/workflows/ci.yml")
    [job] = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[-1] == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o111
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}  # `on` in YAML


def test_hooks_equal_make_lint_s():
    [repository] = read(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    makefile = (ROOT / "Makefile").read_text()
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    lint = re.sub(r"\$\(CODE\)|\$\(call TRACKED\)", ".", lint)  # git's files, as in the hooks
    tools = re.split(r" && |\n", re.sub(r"[\t@]|\$\(BIN\)/", "", lint.strip()))
    assert [re.sub(r" --force-exclude$", " .", entry) for entry in entries] == tools


@pytest.mark.parametrize("form", ["bug", "proposal"])
def test_issue_forms_have_labelled_fields(form):
    content = read(f".github/ISSUE_TEMPLATE/{form}.yml")
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert content["name"] and content["description"]
    assert len({field["id"] for field in fields}) == len(fields) >= 3
    assert all(field["attributes"]["label"] for field in fields)


def test_version_is_the_same_everywhere():
    assert PROJECT["version"] == __version__ == str(read(".github/CITATION.cff")["version"])
    changelog = (ROOT / ".github/CHANGELOG.md").read_text()
    assert re.search(rf"^## .*\b{re.escape(__version__)}(?![.\d])", changelog, re.MULTILINE)


def test_version_needs_no_torch():
    code = "import job, sys; print(job.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [__version__, "False"], done.stderr


@pytest.mark.parametrize("program", ["train", "export"])
def test_version_is_printed(program, capsys):
    main = importlib.import_module(f"job.{program}").main
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"moco-mgd {__version__}\n"


def test_citation_matches_the_project():
    citation = read(".github/CITATION.cff")
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]
    papers = {reference["url"] for reference in citation["references"]}
    linked = re.findall(r"https://arxiv\.org/abs/[\d.]+\d", (ROOT / "README.md").read_text())
    assert papers >= set(linked)


def test_contributing_distiller_passes_its_test(monkeypatch):
    text = pages.section(".github/CONTRIBUTING.md", "## Add a distiller, with a test")
    distiller, test = (ModuleType(name) for name in ("contributed_distiller", "contributed_test"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setitem(sys.modules, distiller.__name__, distiller)
    for module, block in zip((distiller, test), blocks, strict=True):
        exec(compile(block, module.__name__, "exec"), module.__dict__)
    monkeypatch.setitem(DISTILLERS, "cosine", distiller.Cosine)
    assert issubclass(distiller.Cosine, Distiller)
    [check] = [value for name, value in vars(test).items() if name.startswith("test_")]
    check()
