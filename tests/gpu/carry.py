"""Carry packages and images in a folder to a machine that reaches no package registry.

python tests/gpu/carry.py FOLDER fills the folder on a machine with a registry: wheels, Horovod's
source archive and the study's images. On the other machine, `environment` makes a Python
environment of its torch and these wheels. `--python-version` is the other machine's Python. `--all`
adds the project's own requirements. torch, torchvision and their requirements are never carried.
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
TORCH = {"torch", "torchvision"}  # the other machine has its own
HOROVOD = "horovod==0.28.1"
CMAKE = "cmake==3.31.10"  # docker/build_horovod.sh installs it if it is missing
EXTRAS = ("horovod",)
TESTS = ("pytest", "hypothesis", "tensorboard")  # of the extra `test`
INDIRECT = {"cffi": ["pycparser"], "pytest": ["pluggy", "iniconfig", "pygments"]}
INDIRECT |= {"hypothesis": ["sortedcontainers"]}
IMAGES = ("mnist",)  # image sets of the study that need no system package
GLIBC = range(17, 40)  # minor versions of manylinux_2_N


def name_of(requirement: str) -> str:
    """Return the package of a requirement, such as pytest for pytest>=9.2,<10."""
    return re.match(r"[\w.-]+", requirement)[0].lower()


def needs(everything: bool) -> list[str]:
    """Return the requirements of Horovod's build and the tests, without torch.

    everything: include the project's own requirements.
    """
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    chosen = [requirement for extra in EXTRAS for requirement in optional[extra]]
    known = [*optional["test"], *optional["tensorboard"]]
    chosen += [requirement for requirement in known if name_of(requirement) in TESTS]
    if everything:
        chosen += project["dependencies"]
    return [requirement for requirement in chosen if name_of(requirement) not in TORCH]


def pinned() -> dict[str, str]:
    """Return the versions of docker/constraints.txt by package."""
    text = (REPO / "docker/constraints.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.!+-]+)", text, re.MULTILINE))


def names(everything: bool) -> list[str]:
    """Return the packages to carry, with their own requirements."""
    own = [name_of(requirement) for requirement in needs(everything)]
    indirect = [more for name in own for more in INDIRECT.get(name, [])]
    return sorted({*own, *indirect} - TORCH)


def fill(folder: Path, python: str, machine: str, everything: bool) -> None:
    """Download wheels, Horovod's source and the study's images into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = pinned()
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)]
    platforms += [f"--platform=manylinux2014_{machine}"]
    target = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    packages = [f"{name}=={versions[name]}" for name in names(everything)]
    subprocess.run([*pip, *target, *platforms, *packages, CMAKE], check=True)
    source = ["--no-build-isolation", "--no-binary=:all:", HOROVOD]
    subprocess.run([*pip, *source], check=True)
    for name in IMAGES:
        prepare_images(name, folder)


def prepare_images(name: str, folder: Path) -> None:
    """Pack an image set of the study as NAME.zip."""
    from job.study import data

    images = folder / name
    data.prepare(name, images, data.MOST, print)
    shutil.make_archive(str(images), "zip", images)
    shutil.rmtree(images)


def unpack_images(folder: Path, targets: dict[str, Path]) -> list[str]:
    """Unpack the carried image sets to their folders and return the names of all present sets."""
    for name, target in targets.items():
        archive = folder / f"{name}.zip"
        if archive.is_file() and not target.is_dir():
            with zipfile.ZipFile(archive) as file:
                file.extractall(target)
    return [name for name, target in targets.items() if target.is_dir()]


def sees_torch(environment: Path) -> Path:
    """Make a Python environment with access to this one's packages and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    here = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    folders = [path for path in here if path.endswith(("site-packages", "dist-packages"))]
    (Path(site) / "carried.pth").write_text("\n".join(folders) + "\n")
    return python


def environment(target: Path, folder: Path | None) -> Path:
    """Return the interpreter of an environment with all packages of the session.

    target: folder of the new environment. folder: the carried folder. Without one, this interpreter
    must have all packages.
    CalledProcessError: a package is missing, also in the carried folder.
    """
    if folder is None:
        return Path(sys.executable)
    python = sees_torch(target)
    install = [str(python), "-m", "pip", "install", "-q", "--no-index", "--find-links", str(folder)]
    subprocess.run([*install, *needs(everything=True)], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default=here, help="the other machine's Python")
    parser.add_argument(
        "--machine", default="x86_64", help="the other machine's processor: x86_64, aarch64"
    )
    parser.add_argument(
        "--all", action="store_true", help="carry the project's own requirements too"
    )
    options = parser.parse_args()
    fill(options.folder, options.python_version, options.machine, options.all)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e6:.0f} MB in {len(list(options.folder.iterdir()))} files")


if __name__ == "__main__":
    main()
