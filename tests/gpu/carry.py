"""A folder with what a session needs where no package registry is reachable, and its use there.

python tests/gpu/carry.py FOLDER fills it on a machine with a registry: wheels, Horovod's source
archive, and the study's images. On the other machine, `environment` makes a Python environment of
its torch and of these wheels. `--python-version` is the other machine's Python. `--all` adds the
project's own needs; torch, torchvision and what they need are never carried.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[2]
TORCH = {"torch", "torchvision"}  # as the other machine has them
HOROVOD = "horovod==0.28.1"
CMAKE = "cmake==3.31.10"  # as docker/build_horovod.sh installs it where there is none
EXTRAS = ("horovod",)
TESTS = ("pytest", "hypothesis", "tensorboard")  # of the extra `test`
BEHIND = {"cffi": ["pycparser"], "pytest": ["pluggy", "iniconfig", "pygments"]}
BEHIND |= {"hypothesis": ["sortedcontainers"]}
IMAGES = ("mnist",)  # sets of the study that need no system package
GLIBC = range(17, 40)  # minor versions of manylinux_2_N


def name_of(requirement: str) -> str:
    """Return the package of a requirement: pytest of pytest>=9.2,<10."""
    return re.match(r"[\w.-]+", requirement)[0].lower()


def needs(everything: bool) -> list[str]:
    """Return the requirements of tests and program, without torch.

    everything: the project's own too, not only those of Horovod's build and the tests.
    """
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    found = [requirement for extra in EXTRAS for requirement in optional[extra]]
    known = [*optional["test"], *optional["tensorboard"]]
    found += [requirement for requirement in known if name_of(requirement) in TESTS]
    if everything:
        found += project["dependencies"]
    return [requirement for requirement in found if name_of(requirement) not in TORCH]


def pinned() -> dict[str, str]:
    """Return the versions of docker/constraints.txt by package."""
    text = (REPO / "docker/constraints.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.!+-]+)", text, re.MULTILINE))


def names(everything: bool) -> list[str]:
    """Return the packages to carry, with those that they need."""
    own = [name_of(requirement) for requirement in needs(everything)]
    behind = [more for name in own for more in BEHIND.get(name, [])]
    return sorted({*own, *behind} - TORCH)


def fill(folder: Path, python: str, machine: str, everything: bool) -> None:
    """Download wheels, Horovod's source and the study's images into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = pinned()
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)]
    platforms += [f"--platform=manylinux2014_{machine}"]
    target = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    wanted = [f"{name}=={versions[name]}" for name in names(everything)]
    subprocess.run([*pip, *target, *platforms, *wanted, CMAKE], check=True)
    source = ["--no-build-isolation", "--no-binary=:all:", HOROVOD]
    subprocess.run([*pip, *source], check=True)
    for name in IMAGES:
        prepare_images(name, folder)


def prepare_images(name: str, folder: Path) -> None:
    """Pack a set of the study as NAME.zip."""
    from job.study import data

    images = folder / name
    data.prepare(name, images, data.MOST, print)
    shutil.make_archive(str(images), "zip", images)
    shutil.rmtree(images)


def unpack_images(folder: Path, places: dict[str, Path]) -> list[str]:
    """Unpack the carried sets of the study to their places; return the names of those there now."""
    for name, place in places.items():
        archive = folder / f"{name}.zip"
        if archive.is_file() and not place.is_dir():
            with zipfile.ZipFile(archive) as file:
                file.extractall(place)
    return [name for name, place in places.items() if place.is_dir()]


def sees_torch(environment: Path) -> Path:
    """Make a Python environment that sees this one's packages; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    here = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    folders = [path for path in here if path.endswith(("site-packages", "dist-packages"))]
    (Path(site) / "carried.pth").write_text("\n".join(folders) + "\n")
    return python


def environment(place: Path, folder: Path | None) -> Path:
    """Return the interpreter of an environment with all that the session needs.

    folder: the carried one. Without it, this interpreter must have everything.
    CalledProcessError: a package is missing in both, or Horovod cannot be built.
    """
    if folder is None:
        return Path(sys.executable)
    python = sees_torch(place)
    install = [str(python), "-m", "pip", "install", "-q", "--no-index", "--find-links", str(folder)]
    subprocess.run([*install, *needs(everything=True)], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default=here, help="of the other machine")
    parser.add_argument("--machine", default="x86_64", help="the other machine's: x86_64, aarch64")
    parser.add_argument("--all", action="store_true", help="the project's own needs too")
    options = parser.parse_args()
    fill(options.folder, options.python_version, options.machine, options.all)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e6:.0f} MB in {len(list(options.folder.iterdir()))} files")


if __name__ == "__main__":
    main()
