"""Bad input under horovodrun: both workers end, with one line of error."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from cases import LINEAR, SMALL, fill
from short import short
from tests.campaigns.input.test_bad_data import make_trees
from tests.campaigns.input.test_bad_teachers import FILES as TEACHERS
from tests.campaigns.input.test_bad_yaml import LAUGHS

ROOT = Path(__file__).parents[3]

# name: program, data folder and options, and parts of the error
REFUSED = {
    "a wrong type": ("job.train", "{good} --lr fast", "--lr 'fast'", "a number"),
    "out of range": ("job.train", "{good} --epochs 0", "--epochs 0", "at least 1"),
    "an unknown option": ("job.linear", "{good} --tempreature 1", "--tempreature", "--help"),
    "a conflict": ("job.train", "{good} --batch-size 5", "--batch-size 5", "2 workers", "4 or 6"),
    "an unknown key": (
        "job.train",
        "{good} --config {folder}/typo.yaml",
        "'tempreature'",
        "typo.yaml",
    ),
    "aliases that multiply": (
        "job.train",
        "{good} --config {folder}/laughs.yaml",
        "laughs.yaml",
        "a0",
    ),
    "no folder": ("job.train", "{folder}/none", "{folder}/none", "a folder of images"),
    "other classes": (
        "job.linear",
        "{folder}/val-differs",
        "val-differs",
        "the same classes",
        "b, c",
    ),
    "a class that links back": (
        "job.train",
        "{folder}/class-loops",
        "train/c",
        "leads nowhere or back",
    ),
    "an infinite teacher": (
        "job.train",
        "{good} --teacher {folder}/infinite.pth",
        "bn1.running_var",
        "not finite",
    ),
    "a teacher with code": (
        "job.train",
        "{good} --teacher {folder}/code.pth",
        "code.pth",
        "never loaded",
    ),
    "a small teacher": (
        "job.train",
        "{good} -a resnet50 --teacher {folder}/torchvision.pth",
        "resnet18",
        "stage 1",
    ),
}

# For sitecustomize.py: a change on the second worker only.
ON_SECOND = """
import os, sys
if os.environ.get("HOROVOD_RANK") == "1":
    {change}
"""

# name: program, change, and parts of the error
DIFFERENT = {
    "options": (
        "job.train",
        "sys.argv += '--moco-t 0.3 --seed 1 --epochs 2'.split()",
        "--epochs 2 on worker 1 (node ",
        "): expected 1, as on worker 0; other differences: 2. "
        "Start all workers with the same options",
    ),
    "kernels": (
        "job.linear",
        "os.environ['ATEN_CPU_CAPABILITY'] = 'default'; sys.argv += ['--seed', '1']",
        "CPU kernels DEFAULT on worker 1 (node ",
        ", as on worker 0; other differences: 1. Set ATEN_CPU_CAPABILITY=default for all workers",
    ),
    "programs": (
        "job.train",
        "os.chdir('{folder}/program')",  # `python -m` looks there first
        "this program's files ",
        ", as on worker 0. Install the same version",
    ),
}


@pytest.fixture(scope="module")
def values(good, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    make_trees(folder, good)
    (folder / "typo.yaml").write_text("tempreature: 1")
    (folder / "laughs.yaml").write_text(LAUGHS)
    for name in ("infinite.pth", "code.pth", "torchvision.pth"):
        TEACHERS[name][0](folder / name)
    fill(folder / "one-bad" / "train" / "a", 7)
    (folder / "one-bad" / "train" / "a" / "bad.png").touch()
    return {"good": good, "folder": folder}


@pytest.fixture
def run(start_job, values, tmp_path):
    """A function that runs two workers. It returns the exit code, all lines, and the errors."""

    def to_end(line, program="job.train"):
        data, *options = line.format(**values).split()
        small = SMALL if program == "job.train" else LINEAR
        job = start_job(2, tmp_path / "run", [data, *small, *options], program)
        lines = job.finish().splitlines()
        of_workers = [line for line in lines if line.startswith("[")]  # others: the launcher's
        assert not any("Traceback" in line or "Error" in line for line in of_workers), lines
        return job.process.returncode, lines, [line for line in of_workers if "error: " in line]

    return to_end


@pytest.mark.parametrize("name", short(REFUSED, "a conflict"))
def test_workers_print_one_error(name, run, values, tmp_path):
    program, line, *parts = REFUSED[name]
    code, lines, errors = run(line, program)
    assert code == 2, lines
    assert len(errors) == 1 and errors[0].startswith("[0]<stderr>:error: "), lines
    assert all(part.format(**values) in errors[0] for part in parts), lines
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", short(DIFFERENT, "options"))
def test_different_worker_ends_all(name, run, tmp_path, tmp_path_factory, monkeypatch):
    """The run ends before it makes its folder."""
    if name == "kernels" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has only torch's default kernels")
    program, change, *parts = DIFFERENT[name]
    folder = tmp_path_factory.mktemp("different")
    for package in ("job", "mgd", "moco"):
        shutil.copytree(
            ROOT / package,
            folder / "program" / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    with open(folder / "program" / "moco" / "queue.py", "a") as file:
        file.write("# Another version.\n")
    (folder / "sitecustomize.py").write_text(ON_SECOND.format(change=change.format(folder=folder)))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    code, lines, errors = run("{good}", program)
    assert code == 2, lines
    assert len(errors) == 1 and errors[0].startswith("[0]<stderr>:error: "), lines
    assert all(part in errors[0] for part in parts), lines
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("loaders", [0, 1])
def test_only_bad_images_end_both_workers(run, tmp_path, loaders):
    code, lines, errors = run(f"{{folder}}/all-bad -j {loaders}")
    assert code == 2, lines
    assert len(errors) == 1 and "8 of 8 images cannot be decoded" in errors[0], lines
    assert sorted(os.listdir(tmp_path / "run")) == ["config.yaml", "log.txt", "metrics.jsonl"]


@pytest.mark.short
def test_bad_image_is_logged_once(run, tmp_path):
    code, lines, errors = run("{folder}/one-bad -j 1")
    assert code == 0 and not errors, lines
    bad = "one-bad/train/a/bad.png: no image of a known format"
    assert sum(bad in line for line in lines) == 1
    assert (tmp_path / "run" / "last.pth.tar").is_file()
