"""The package: ranges, pinned versions, archives, and the Python of `make setup`."""

import hashlib
import importlib.metadata
import itertools
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
import torch
import torchvision
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pages

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
CONSTRAINTS, INSTALLER = REPO / "docker/constraints.txt", REPO / "docker/pip.txt"


# Ranges and versions.


def pins(path):
    """Return the version and the hashes of each package in a requirements file."""
    versions = {}
    for entry in re.split(r"\n(?=\w)", path.read_text()):
        if match := re.match(r"([\w.-]+)==([^\s;]+)", entry):
            versions[match[1]] = match[2], set(re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", entry))
    return versions


def test_pins_are_in_range_and_hashed():
    pinned = pins(CONSTRAINTS)
    texts = [*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())]
    for requirement in map(Requirement, texts):
        if requirement.name != PROJECT["name"]:
            version, _ = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement
    assert not [name for name, (_, hashes) in (pinned | pins(INSTALLER)).items() if not hashes]


def test_pins_name_no_package_index():
    assert "://" not in CONSTRAINTS.read_text() + INSTALLER.read_text()


SMALL_WHEEL = {  # by file of its metadata
    "METADATA": "Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
    "Provides-Extra: more\nRequires-Dist: small; extra == 'more'\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
BACKEND = """
import os
def build_wheel(*_): ...
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(f"{folder}/project-1.dist-info")
    open(f"{folder}/project-1.dist-info/METADATA", "w").write(METADATA)
    return "project-1.dist-info"
"""


def pip_options(path):
    """Return pip's options for pinned versions in a file of the repository."""
    pattern = r"--no-require-hashes(?: --?\S+ \S*constraints.txt)+"
    return re.search(pattern, (REPO / path).read_text())[0].split()


@pytest.mark.slow
def test_pins_refuse_another_hash(tmp_path):
    options = [option.removeprefix("docker/") for option in pip_options("Makefile")]
    assert options == pip_options("docker/Dockerfile")
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in SMALL_WHEEL.items():
            archive.writestr(f"small-1.dist-info/{name}", content.format(name="small"))
    (tmp_path / "pyproject.toml").write_text(
        'build-system = { requires = [], build-backend = "b", backend-path = ["."] }\n'
    )
    (tmp_path / "b.py").write_text(
        f"METADATA = {SMALL_WHEEL['METADATA'].format(name='project')!r}\n{BACKEND}"
    )
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index"]
    pip += ["--find-links", tmp_path, "--only-deps", ".[more]", *options]
    runs = []
    for digest in (hashlib.sha256(wheel.read_bytes()).hexdigest(), "0" * 64):
        (tmp_path / "constraints.txt").write_text(f"small==1 --hash=sha256:{digest}\n")
        runs.append(subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True))
    assert "Would install small-1" in runs[0].stdout, runs[0].stderr
    assert runs[1].returncode == 1 and "DO NOT MATCH THE HASHES" in runs[1].stderr


def test_image_has_the_extras_of_runs():
    """ONNX, trackers and the extras for this repository are absent."""
    text = (REPO / "docker/Dockerfile").read_text()
    extras = re.search(r"--only-deps '\.\[(.+)\]'", text)[1].split(",")
    assert extras == sorted(EXTRAS.keys() - {"onnx", "mlflow", "wandb", "study", "test"})


def test_pythons_are_the_same_everywhere():
    label = "Programming Language :: Python :: "
    versions = [name.removeprefix(label) for name in PROJECT["classifiers"]]
    assert [version for version in versions if version.startswith("3.")] == PYTHONS
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    makefile = (REPO / "Makefile").read_text()
    accepted = re.search(r'"\$\(PYTHON_VERSION\)" =~ (\S+)', makefile)[1].replace("$$", "$")
    assert [f"3.{minor}" for minor in range(7, 30) if re.search(accepted, f"3.{minor}")] == PYTHONS


# Archives.

BUILD = "import sys; from setuptools import build_meta; "
BUILD += "print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind, source, folder):
    """Build an archive of the files in `source`, as pip does, and return its path."""
    command = [sys.executable, "-c", BUILD, kind, folder]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive of the repository, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("archives")
    repository = folder / "repository"
    repository.mkdir()
    files = "LICENSE MANIFEST.in Makefile README.md pyproject.toml setup.py"
    for name in files.split():
        shutil.copy(REPO / name, repository)
    for name in (".github", "docker", "job", "mgd", "moco", "slurm", "tests"):
        shutil.copytree(REPO / name, repository / name)
    source = build("build_sdist", repository, folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return source, build("build_wheel", folder / source.name.removesuffix(".tar.gz"), folder)


@pytest.mark.slow
def test_source_archive_has_the_linked_files(archives):
    source, _ = archives
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    linked = set()
    for page in pages.PAGES:
        paths = [target.partition("#")[0] for target in pages.links(page)]
        files = [(page.parent / path).resolve() for path in paths if path]
        linked |= {str(file.relative_to(REPO)) for file in files if file.is_file()}
    assert "job/show/pictures/method.svg" in linked and linked <= names
    others = "Makefile LICENSE docker/build_horovod.sh slurm/train.sbatch tests/conftest.py"
    assert {*others.split()} <= names


@pytest.mark.slow
@pytest.mark.short
def test_wheel_contents(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
        [script] = [name for name in names if name.endswith(".data/scripts/build_horovod.sh")]
        content = archive.read(script)
    assert content == (REPO / "docker/build_horovod.sh").read_bytes()
    data = "job/py.typed mgd/py.typed moco/py.typed job/presets/small.yaml"
    assert {*data.split(), "job/show/report/report.html"} <= {*names}
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"job", "mgd", "moco", "moco_mgd"}
    pictures = "job/show/pictures/"
    assert not [name for name in names if name.startswith(pictures) or "/results/" in name]


@pytest.mark.slow
def test_wheel_metadata(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# MoCo v2 with Matching Guided Distillation")
    assert len(metadata.get_all("Project-URL")) == 2
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def closure(requirements):
    """Return the installed distributions that pip would install for requirements, by name."""
    distributions, seen, waiting = {}, set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name
        for extra in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            distributions[name] = distribution = importlib.metadata.distribution(name)
            for each in map(Requirement, distribution.requires or []):
                if each.marker is None or each.marker.evaluate({"extra": extra}):
                    waiting.append(each)
    return distributions


def environment(folder, requirements):
    """Make a virtual environment with links to installed packages and return its Python."""
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for distribution in closure(requirements).values():
        for name in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The folder of commands after `pip install .`: no Horovod, no extras."""
    python = environment(tmp_path_factory.mktemp("environment"), PROJECT["dependencies"])
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", archives[1]], check=True)
    return python.parent


@pytest.fixture(scope="module")
def user(installed, tmp_path_factory):
    """A function that runs a command in a user's folder, without a compiler on PATH."""
    folder = tmp_path_factory.mktemp("user")

    def run(line, **variables):
        environment = {"PATH": str(installed), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        command = [installed / line.split()[0], *line.split()[1:]]
        options = dict(capture_output=True, text=True, timeout=600)
        return subprocess.run(command, cwd=folder, env=environment | variables, **options)

    run.folder = folder
    return run


@pytest.mark.slow
def test_wheel_installs_the_horovod_build(installed):
    command = [installed / "build_horovod.sh", "no-python"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "build_horovod: no interpreter 'no-python'\n")


@pytest.mark.slow
@pytest.mark.short
def test_one_worker_needs_no_horovod_or_extras(user):
    """Run each command, from digits to a report. The study needs only its extra, for images."""
    torch.save(torchvision.models.resnet18().state_dict(), user.folder / "teacher.pth")
    for line in (
        "mgd-train digits --config small --teacher teacher.pth --image-size 16 --batch-size 256 "
        "--epochs 1 -j 0 --out run",
        "mgd-linear digits --pretrained run/last.pth.tar --epochs 1 -j 0 --out linear",
        "mgd-embed digits --pretrained run/last.pth.tar -j 0 --out features.npy",
        "mgd-export run/last.pth.tar student.safetensors",
        "mgd-pack data/digits packed",
        "mgd-watch --once run",
        "mgd-report run linear --no-features --out report.html",
    ):
        done = user(line)
        assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    names = {path.name for path in user.folder.iterdir()}
    assert {"run", "linear", "features.npy", "packed", "report.html"} <= names
    assert "student.safetensors" in names
    done = user("python -m job.study.study small --out study")
    assert done.returncode == 2 and "pip install '.[study]'" in done.stderr


@pytest.mark.slow
@pytest.mark.short
def test_workers_without_horovod_are_one_line(user, installed):
    done = user("mgd-train digits", HOROVOD_RANK="0", HOROVOD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr == (
        "error: Horovod is not installed for this Python, and several workers need it. Run "
        f"build_horovod.sh {installed}/python (the script is next to mgd-train, and in docker/ "
        "of a clone)\n"
    )


# mgd in the training of other projects.

ABSENT = ["job", "moco", "torchvision", "yaml", "PIL", "cv2", "horovod"]


@pytest.mark.slow
@pytest.mark.short
def test_mgd_needs_only_torch_and_scipy(archives, tmp_path):
    """The example of mgd/README.md runs without the other packages of this project."""
    python = environment(tmp_path / "environment", ["torch", "scipy"])
    with zipfile.ZipFile(archives[1]) as archive:
        members = [name for name in archive.namelist() if name.startswith("mgd/")]
        archive.extractall(tmp_path, members)
    example = re.search(r"```python\n(.*?)```", (REPO / "mgd/README.md").read_text(), re.DOTALL)[1]
    absent = "from importlib.util import find_spec\n"
    absent += f"print([name for name in {ABSENT} if find_spec(name)])\n"
    (tmp_path / "example.py").write_text("import torch; torch.manual_seed(1)\n" + example + absent)
    options = dict(env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    done = subprocess.run([python, "example.py"], cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    *epochs, present = done.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in epochs]
    assert present == "[]" and len(losses) == 4 and losses[-1] < losses[0] / 2


# The Python of `make setup`.

OTHER = "3.14" if sys.version_info[:2] != (3, 14) else "3.13"  # than this Python


def python_of(version, path):
    """Return a program that prints a version of Python."""
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path):
    """A function that runs make in a clone with a `.venv` of this Python. -n prints commands."""
    files = "pyproject.toml docker/pip.txt docker/constraints.txt docker/build_horovod.sh"
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(REPO / "Makefile", tmp_path)
    venv.create(tmp_path / ".venv", symlinks=True)
    (tmp_path / f".venv/.ready-{sys.version_info[0]}.{sys.version_info[1]}").touch()
    dropped = ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)

    def make(*command):
        return subprocess.run(["make", *command], **options)

    make.folder = tmp_path
    return make


def test_venv_is_reused(clone):
    assert clone("-q", "setup").returncode == 0
    assert clone("-q", "setup", f"PYTHON={sys.executable}").returncode == 0


def test_venv_of_another_python_is_replaced(clone):
    other = python_of(OTHER, clone.folder / "other")
    assert f"{other} -m venv --clear .venv" in clone("-n", "setup", f"PYTHON={other}").stdout


def test_venv_of_an_upgraded_python_is_replaced(clone):
    python_of(OTHER, clone.folder / ".venv/bin/python")
    assert ".venv/bin/python -m venv --clear .venv" in clone("-n", "setup").stdout


def test_venv_of_a_removed_python_is_replaced(clone):
    for python in clone.folder.glob(".venv/bin/python*"):
        python.unlink()
        python.symlink_to("/nowhere/python")
    assert "python3 -m venv --clear .venv" in clone("-n", "setup").stdout


def test_venv_is_kept_for_new_versions(clone):
    os.utime(clone.folder / "docker/constraints.txt", (2**32, 2**32))
    commands = clone("-n", "setup").stdout
    assert ".venv/bin/python -m venv" in commands and "--clear" not in commands


@pytest.mark.parametrize("version", ["3.10", "3.15", None])
def test_unsupported_python_is_one_line(clone, version):
    other = python_of(version, clone.folder / "other") if version else "/nowhere/python"
    done = clone("setup", f"PYTHON={other}")
    line = f"setup: PYTHON={other}: {version or 'missing'}; expected Python 3.11 to 3.14."
    line += " Run make PYTHON=python3.12 ..."
    assert done.returncode == 2 and done.stderr.splitlines()[0] == line
    assert (clone.folder / ".venv/bin/python").exists()
