"""The package: its ranges and the pinned versions, its archives, and the Python that `make setup` takes."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
IMAGE, ALL = REPO / "docker/requirements.txt", REPO / "tests/requirements.txt"


# Ranges and versions.


def pins(path):
    """The version and the hashes of each package of a requirements file."""
    found = {}
    for entry in re.split(r"\n(?=\w)", path.read_text()):
        if match := re.match(r"([\w.-]+)==([^\s;]+)", entry):
            found[match[1]] = match[2], set(re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", entry))
    return found


def direct(extras):
    """The requirements of the package and of `extras`; an extra of the package's own in them is resolved."""
    texts = PROJECT["dependencies"] + [text for extra in extras for text in EXTRAS[extra]]
    for requirement in map(Requirement, texts):
        if requirement.name == PROJECT["name"]:
            yield from direct(requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize("path, extras", [(IMAGE, ["horovod", "digits", "tensorboard"]), (ALL, EXTRAS)], ids=["image", "all"])
def test_each_pinned_version_is_in_its_range_and_has_hashes(path, extras):
    pinned = pins(path)
    assert len(pinned) > 40
    for requirement in direct(extras):
        version, _ = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert not [name for name, (_, hashes) in pinned.items() if not hashes]


def test_the_image_has_the_versions_that_the_tests_run_with():
    every = pins(ALL)
    assert {name: every.get(name) for name in pins(IMAGE)} == pins(IMAGE)


def test_the_pinned_versions_name_no_package_index():
    assert "://" not in IMAGE.read_text() + ALL.read_text()


def test_all_that_names_the_pythons_names_the_same():
    versions = [label.removeprefix("Programming Language :: Python :: ") for label in PROJECT["classifiers"]]
    assert [version for version in versions if version.startswith("3.")] == PYTHONS
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    accepted = re.search(r'"\$\(PYTHON_VERSION\)" =~ (\S+)', (REPO / "Makefile").read_text())[1].replace("$$", "$")
    assert [f"3.{minor}" for minor in range(7, 30) if re.search(accepted, f"3.{minor}")] == PYTHONS


# Archives.

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind, source, folder):
    """Build an archive of the sources in `source`, as pip does; return its path."""
    done = subprocess.run([sys.executable, "-c", BUILD, kind, folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive of the repository, and a wheel that was built from that."""
    folder = tmp_path_factory.mktemp("archives")
    repository = folder / "repository"
    repository.mkdir()
    for name in ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(REPO / name, repository)
    for name in ("docker", "job", "mgd", "moco", "slurm", "tests"):
        shutil.copytree(REPO / name, repository / name)
    source = build("build_sdist", repository, folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return source, build("build_wheel", folder / source.name.removesuffix(".tar.gz"), folder)


@pytest.mark.slow
def test_the_source_archive_has_what_its_readme_names(archives):
    source, _ = archives
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    linked = set(re.findall(r"\]\(([^)#:]+)\)", (REPO / "README.md").read_text()))
    assert "job/show/pictures/method.svg" in linked and linked <= names | {"README.md"}
    assert {"Makefile", "LICENSE", "docker/build_horovod.sh", "slurm/train.sbatch", "tests/conftest.py"} <= names


@pytest.mark.slow
def test_the_wheel_has_types_and_the_horovod_build_but_no_tests(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
        script = archive.read(next(name for name in names if name.endswith(".data/scripts/build_horovod.sh")))
    assert script == (REPO / "docker/build_horovod.sh").read_bytes()
    assert {"job/py.typed", "mgd/py.typed", "moco/py.typed", "job/presets/small.yaml", "job/show/report/report.html"} <= set(
        names
    )
    assert {name.split("/")[0].split("-")[0] for name in names} == {"job", "mgd", "moco", "moco_mgd"}
    assert not [name for name in names if name.startswith("job/show/pictures/") or "/results/" in name]


@pytest.mark.slow
def test_the_wheel_describes_itself(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# MoCo v2 with Matching Guided Distillation")
    assert len(metadata.get_all("Project-URL")) == 2 and "Typing :: Typed" in metadata.get_all("Classifier")


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The commands of an empty environment with the wheel, which takes all other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, archives[1]], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    others = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text(others)
    return folder / "bin"


@pytest.mark.slow
def test_a_command_of_the_wheel_runs(installed):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [installed / "mgd-pack", "--help"]
    done = subprocess.run(words, cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.slow
def test_the_horovod_build_of_the_wheel_is_a_program(installed):
    done = subprocess.run([installed / "build_horovod.sh", "no-python"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "build_horovod: no interpreter 'no-python'\n")


@pytest.fixture
def without_horovod(tmp_path):
    """The variables of an environment in which Horovod is not installed."""
    (tmp_path / "horovod.py").write_text("raise ImportError")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.slow
def test_one_worker_trains_without_horovod(installed, without_horovod, images, tmp_path):
    options = "--width 16 --image-size 16 --batch-size 10 --moco-k 20 --epochs 1 -j 0 --knn-every 1".split()
    words = [installed / "mgd-train", images, *options, "--out", tmp_path / "run"]
    done = subprocess.run(words, cwd=tmp_path, env=without_horovod, capture_output=True, text=True)
    assert done.returncode == 0 and "no Horovod, as one worker needs none" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run" / "complete").exists()


@pytest.mark.slow
def test_several_workers_without_horovod_name_its_build(installed, without_horovod, images, tmp_path):
    environment = without_horovod | {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}
    done = subprocess.run([installed / "mgd-train", images], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: Horovod is not installed for this Python, and several workers need it: run build_horovod.sh {installed}/python "
        "(the script is in the folder of mgd-train, and in docker/ of a clone)\n"
    )


# The Python of `make setup`.


def python_of(version, path):
    """A program that says that it is Python `version`, and does nothing else."""
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path):
    """A clone with a `.venv` of this Python, and a function that runs make there; -n prints the commands only."""
    for name in ("pyproject.toml", "tests/requirements.txt", "docker/build_horovod.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(REPO / "Makefile", tmp_path)
    venv.create(tmp_path / ".venv", symlinks=True)
    (tmp_path / f".venv/.ready-{sys.version_info[0]}.{sys.version_info[1]}").touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}

    def make(*words):
        return subprocess.run(["make", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    make.folder = tmp_path
    return make


def test_a_venv_that_is_ready_is_used(clone):
    assert clone("-q", "setup").returncode == 0
    assert clone("-q", "setup", f"PYTHON={sys.executable}").returncode == 0


def test_a_venv_of_another_python_is_replaced(clone):
    other = python_of("3.14" if sys.version_info[:2] != (3, 14) else "3.13", clone.folder / "other")
    assert f"{other} -m venv --clear .venv" in clone("-n", "setup", f"PYTHON={other}").stdout


def test_a_venv_whose_python_an_upgrade_has_replaced_is_replaced(clone):
    python_of("3.14" if sys.version_info[:2] != (3, 14) else "3.13", clone.folder / ".venv/bin/python")
    assert ".venv/bin/python -m venv --clear .venv" in clone("-n", "setup").stdout


def test_a_venv_whose_python_has_gone_is_replaced(clone):
    for python in clone.folder.glob(".venv/bin/python*"):
        python.unlink()
        python.symlink_to("/nowhere/python")
    assert "python3 -m venv --clear .venv" in clone("-n", "setup").stdout


def test_new_versions_go_into_the_same_venv(clone):
    os.utime(clone.folder / "tests/requirements.txt", (2**32, 2**32))
    commands = clone("-n", "setup").stdout
    assert ".venv/bin/python -m venv" in commands and "--clear" not in commands


@pytest.mark.parametrize("version", ["3.10", "3.15", None])
def test_a_python_without_wheels_ends_in_one_line(clone, version):
    other = python_of(version, clone.folder / "other") if version else "/nowhere/python"
    done = clone("setup", f"PYTHON={other}")
    line = f"setup: Python 3.11 to 3.14 is needed; {other} is {version or 'missing'}: make PYTHON=python3.12 ..."
    assert done.returncode == 2 and done.stderr.splitlines()[0] == line
    assert (clone.folder / ".venv/bin/python").exists()
