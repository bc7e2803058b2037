"""The package: its ranges and the pinned versions, its archives, and the Python that `make setup` takes."""

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
    """The version and the hashes of each package of a requirements file."""
    found = {}
    for entry in re.split(r"\n(?=\w)", path.read_text()):
        if match := re.match(r"([\w.-]+)==([^\s;]+)", entry):
            found[match[1]] = match[2], set(re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", entry))
    return found


def test_pins_are_in_range_and_hashed():
    pinned = pins(CONSTRAINTS)
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())]
    ):
        if requirement.name != PROJECT["name"]:
            version, _ = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement
    assert not [name for name, (_, hashes) in (pinned | pins(INSTALLER)).items() if not hashes]


def test_pins_name_no_package_index():
    assert "://" not in CONSTRAINTS.read_text() + INSTALLER.read_text()


SMALL_WHEEL = {  # by file of its metadata
    "METADATA": "Metadata-Version: 2.1\nName: {name}\nVersion: 1\nProvides-Extra: more\nRequires-Dist: small; extra == 'more'\n",
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
    """The options with which a file of the repository lets pip install pinned versions."""
    return re.search(
        r"--no-require-hashes(?: --?\S+ \S*constraints.txt)+", (REPO / path).read_text()
    )[0].split()


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
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "--find-links",
        tmp_path,
        "--only-deps",
        ".[more]",
    ]
    found = []
    for digest in (hashlib.sha256(wheel.read_bytes()).hexdigest(), "0" * 64):
        (tmp_path / "constraints.txt").write_text(f"small==1 --hash=sha256:{digest}\n")
        found.append(subprocess.run([*pip, *options], cwd=tmp_path, capture_output=True, text=True))
    assert "Would install small-1" in found[0].stdout, found[0].stderr
    assert found[1].returncode == 1 and "DO NOT MATCH THE HASHES" in found[1].stderr


def test_image_has_the_extras_of_runs():
    """ONNX is for the machine that exports, trackers for sites that have one, the rest for this repository."""
    text = (REPO / "docker/Dockerfile").read_text()
    extras = re.search(r"--only-deps '\.\[(.+)\]'", text)[1].split(",")
    assert extras == sorted(EXTRAS.keys() - {"onnx", "mlflow", "wandb", "study", "test"})


def test_pythons_are_the_same_everywhere():
    versions = [
        label.removeprefix("Programming Language :: Python :: ") for label in PROJECT["classifiers"]
    ]
    assert [version for version in versions if version.startswith("3.")] == PYTHONS
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    accepted = re.search(r'"\$\(PYTHON_VERSION\)" =~ (\S+)', (REPO / "Makefile").read_text())[
        1
    ].replace("$$", "$")
    assert [f"3.{minor}" for minor in range(7, 30) if re.search(accepted, f"3.{minor}")] == PYTHONS


# Archives.

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind, source, folder):
    """Build an archive of the sources in `source`, as pip does; return its path."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, folder], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive of the repository, and a wheel that was built from that."""
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
    assert {
        "Makefile",
        "LICENSE",
        "docker/build_horovod.sh",
        "slurm/train.sbatch",
        "tests/conftest.py",
    } <= names


@pytest.mark.slow
def test_wheel_contents(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        names = archive.namelist()
        script = archive.read(
            next(name for name in names if name.endswith(".data/scripts/build_horovod.sh"))
        )
    assert script == (REPO / "docker/build_horovod.sh").read_bytes()
    assert {
        "job/py.typed",
        "mgd/py.typed",
        "moco/py.typed",
        "job/presets/small.yaml",
        "job/show/report/report.html",
    } <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "job",
        "mgd",
        "moco",
        "moco_mgd",
    }
    assert not [
        name for name in names if name.startswith("job/show/pictures/") or "/results/" in name
    ]


@pytest.mark.slow
def test_wheel_metadata(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# MoCo v2 with Matching Guided Distillation")
    assert len(metadata.get_all("Project-URL")) == 2 and "Typing :: Typed" in metadata.get_all(
        "Classifier"
    )


def closure(requirements):
    """The installed distributions that requirements need, by name, as pip would install them."""
    found, seen, waiting = {}, set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras} - {
            extra for name, extra in seen if name == requirement.name
        }:
            seen.add((requirement.name, extra))
            found[requirement.name] = distribution = importlib.metadata.distribution(
                requirement.name
            )
            needed = map(Requirement, distribution.requires or [])
            waiting += [
                one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})
            ]
    return found


def environment(folder, requirements):
    """Make a virtual environment with the packages that requirements need, linked from this one; return its Python."""
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for distribution in closure(requirements).values():
        for name in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The commands of an environment such as `pip install .` makes: no Horovod, no extras."""
    python = environment(tmp_path_factory.mktemp("environment"), PROJECT["dependencies"])
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, archives[1]], check=True)
    return python.parent


@pytest.fixture(scope="module")
def user(installed, tmp_path_factory):
    """A function that runs a command in a folder of a user's, without a compiler on PATH, and returns what it did."""
    folder = tmp_path_factory.mktemp("user")

    def run(line, **variables):
        environment = {
            "PATH": str(installed),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        } | variables
        words = [installed / line.split()[0], *line.split()[1:]]
        return subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )

    run.folder = folder
    return run


@pytest.mark.slow
def test_wheel_installs_the_horovod_build(installed):
    done = subprocess.run(
        [installed / "build_horovod.sh", "no-python"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "build_horovod: no interpreter 'no-python'\n")


@pytest.mark.slow
def test_one_worker_needs_no_horovod_or_extras(user):
    """From digits to a report, by each command. The study then has what it needs but its images, which an extra brings."""
    torch.save(torchvision.models.resnet18().state_dict(), user.folder / "teacher.pth")
    for line in (
        "mgd-train digits --config small --teacher teacher.pth --image-size 16 --batch-size 256 --epochs 1 -j 0 --out run",
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
    assert {
        "run",
        "linear",
        "features.npy",
        "student.safetensors",
        "packed",
        "report.html",
    } <= names
    done = user("python -m job.study.study small --out study")
    assert done.returncode == 2 and "pip install '.[study]'" in done.stderr


@pytest.mark.slow
def test_workers_without_horovod_are_one_line(user, installed):
    done = user("mgd-train digits", HOROVOD_RANK="0", HOROVOD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr == (
        "error: Horovod is not installed for this Python, and several workers need it. Run "
        f"build_horovod.sh {installed}/python (the script is next to mgd-train, and in docker/ "
        "of a clone)\n"
    )


# mgd in other people's training.

ABSENT = ["job", "moco", "torchvision", "yaml", "PIL", "cv2", "horovod"]


@pytest.mark.slow
def test_mgd_needs_only_torch_and_scipy(archives, tmp_path):
    """The example of its README, in an environment that has nothing else of this project."""
    python = environment(tmp_path / "environment", ["torch", "scipy"])
    with zipfile.ZipFile(archives[1]) as archive:
        archive.extractall(
            tmp_path, [name for name in archive.namelist() if name.startswith("mgd/")]
        )
    example = re.search(r"```python\n(.*?)```", (REPO / "mgd/README.md").read_text(), re.DOTALL)[1]
    absent = f"from importlib.util import find_spec\nprint([name for name in {ABSENT} if find_spec(name)])\n"
    (tmp_path / "example.py").write_text("import torch; torch.manual_seed(1)\n" + example + absent)
    environ = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "example.py"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *epochs, found = done.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in epochs]
    assert found == "[]" and len(losses) == 4 and losses[-1] < losses[0] / 2


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
    for name in (
        "pyproject.toml",
        "docker/pip.txt",
        "docker/constraints.txt",
        "docker/build_horovod.sh",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(REPO / "Makefile", tmp_path)
    venv.create(tmp_path / ".venv", symlinks=True)
    (tmp_path / f".venv/.ready-{sys.version_info[0]}.{sys.version_info[1]}").touch()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
    }

    def make(*words):
        return subprocess.run(
            ["make", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    make.folder = tmp_path
    return make


def test_venv_is_reused(clone):
    assert clone("-q", "setup").returncode == 0
    assert clone("-q", "setup", f"PYTHON={sys.executable}").returncode == 0


def test_venv_of_another_python_is_replaced(clone):
    other = python_of("3.14" if sys.version_info[:2] != (3, 14) else "3.13", clone.folder / "other")
    assert f"{other} -m venv --clear .venv" in clone("-n", "setup", f"PYTHON={other}").stdout


def test_venv_of_an_upgraded_python_is_replaced(clone):
    python_of(
        "3.14" if sys.version_info[:2] != (3, 14) else "3.13", clone.folder / ".venv/bin/python"
    )
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
