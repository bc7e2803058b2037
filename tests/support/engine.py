"""Real container engines, docker and podman, and the project's image.

The base image is made on this machine: no image registry is used.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DOCKER = {"docker": "docker.io", "dockerd": "docker.io", "debootstrap": "debootstrap"}
# runc, because crun refuses machines with both versions of cgroups.
PODMAN = {"podman": "podman", "runc": "runc", "catatonit": "catatonit"}
IMAGE = "moco-mgd:test"
GB = 10**9  # bytes
# Disk space at the peak. The image has 5.7 GB, and so has the environment's layer before it. While
# docker saves a layer, it has it twice. A copy needs a file of docker, one of podman and the image.
BUILD_GB, COPY_GB = 20, 18


def missing(needed=DOCKER) -> str:
    """Return an error that names the missing packages, or ""."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    packages = {package for name, package in needed.items() if not shutil.which(name, path=path)}
    return (
        f"no container engine to test with: apt-get install {' '.join(sorted(packages))}"
        if packages
        else ""
    )


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Fail with one line if a folder's disk has less than `needed` GB free.

    The folder of an engine on another machine does not exist here: then its space is unknown.
    """
    if not folder.exists():
        return
    free = shutil.disk_usage(folder).free // (GB / 10) / 10  # rounded down to 0.1 GB
    if free < needed:
        pytest.fail(
            f"{purpose}: {free:.1f} GB are free in {folder}; expected {needed} GB. Free some. To "
            "remove the images of earlier tests: docker/local-engine.sh down; "
            "rm -r runs/local-engine runs/local-podman",
            pytrace=False,
        )


def require_space_to_build(docker) -> None:
    """Fail with one line if the image must be built and the engine's disk is too full."""
    if not docker("images", "--quiet", IMAGE).strip():
        folder = docker("info", "--format", "{{.DockerRootDir}}").strip()
        require_space(Path(folder), BUILD_GB, f"a build of {IMAGE}")


class Engine:
    """The command of an engine. A call runs it with arguments and returns its output."""

    def __init__(self, name: str, variables: dict[str, str]):
        self.name = name
        self.variables = variables  # where its daemon or its storage is
        self.environment = os.environ | variables

    def __call__(self, *arguments, check=True, timeout=120, **more) -> str:
        command = [self.name, *map(str, arguments)]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=timeout,
            **more,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def engine():
    """The variables that point docker at an engine and name the base image.

    If the fixture had to start the engine, it stops it at the end.
    """
    if reason := missing():
        pytest.skip(reason)
    script = REPO / "docker/local-engine.sh"
    before = subprocess.run([script, "status"], capture_output=True, text=True, timeout=60)
    up = subprocess.run([script, "up"], stdout=subprocess.PIPE, text=True, timeout=600)
    assert up.returncode == 0, "local-engine.sh up has failed. Its output is above"
    exports = dict(word.split("=", 1) for word in shlex.split(up.stdout) if word != "export")
    assert set(exports) == {"DOCKER_HOST", "BASE_IMAGE"}
    yield exports
    if before.returncode == 3:
        subprocess.run([script, "down"], check=True, timeout=120)


@pytest.fixture(scope="session")
def docker(engine):
    """The docker command."""
    return Engine("docker", {"DOCKER_HOST": engine["DOCKER_HOST"]})


@pytest.fixture(scope="session")
def podman(docker, image):
    """The podman command, with its own storage.

    If the image has changed, it is copied there from docker (about 2 minutes).
    """
    if reason := missing(PODMAN) or ("podman is tested as root" if os.geteuid() else ""):
        pytest.skip(reason)
    folder = REPO / "runs/local-podman"
    podman = Engine("podman", podman_settings(folder))
    [number] = docker("images", "--quiet", image).split()
    if number not in podman("images", "--quiet", image):
        require_space(folder, COPY_GB, "a copy of the image for podman")
        copy_image(image, docker, podman)
        podman("image", "prune", "--force")
    return podman


def podman_settings(folder: Path) -> dict[str, str]:
    """Configure a podman that keeps all its files in `folder`. Return its variables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
    )
    # As root, podman raises these limits to numbers that the root of a sandbox may not set.
    (folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
    )
    return {
        "CONTAINERS_CONF": f"{folder}/containers.conf",
        "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
    }


def copy_image(image: str, docker: Engine, podman: Engine):
    """Copy an image from docker to podman."""
    with subprocess.Popen(
        ["docker", "save", image], env=docker.environment, stdout=subprocess.PIPE
    ) as saved:
        podman("load", "--quiet", stdin=saved.stdout, timeout=600)
    assert saved.returncode == 0


@pytest.fixture(scope="session", params=["docker", "podman"])
def containers(request):
    """Each engine, with the image."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def builder(docker, engine, tmp_path_factory):
    """The name of the base image in which Horovod is built.

    In the short form (SHORT=1), this image has the wheels of `make setup`. The build of
    docker/Dockerfile then installs the wheel of the same system and versions, if there is one.
    """
    if not os.environ.get("SHORT"):
        return engine["BASE_IMAGE"]
    context = tmp_path_factory.mktemp("builder")
    (context / "wheels").mkdir()
    for folder in kept_wheels():
        shutil.copytree(folder, context / "wheels" / folder.name)
    (context / "Dockerfile").write_text(f"FROM {engine['BASE_IMAGE']}\nCOPY wheels /tmp/wheels\n")
    docker("build", "-t", "moco-mgd-builder:test", context)
    return "moco-mgd-builder:test"


def kept_wheels() -> list[Path]:
    """Return the folders of the wheels that this docker/build_horovod.sh has built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    wheels = Path(os.environ.get("HOROVOD_WHEELS") or cache / "moco-mgd/wheels")
    recipe = hashlib.sha256((REPO / "docker/build_horovod.sh").read_bytes()).hexdigest()[:8]
    return list(wheels.glob(f"horovod-*-{recipe}"))


@pytest.fixture(scope="session")
def build(docker, engine, builder, pytestconfig):
    """A function that builds docker/Dockerfile with the engine's cache and prints its progress."""

    def image(tag, context=REPO):
        file = context / "docker/Dockerfile"
        command = ["docker", "build", "--network=host", "-f", file, "-t", tag]
        for name, value in (
            ("BASE_IMAGE", builder),
            ("RUNTIME_IMAGE", engine["BASE_IMAGE"]),
            ("VERSION", "test"),
        ):
            command += ["--build-arg", f"{name}={value}"]

        def number():
            return docker("images", "--quiet", tag).strip()

        require_space_to_build(docker)
        before = number()
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nbuilding {tag} (about 7 minutes with an empty cache)", flush=True)
            lines = []
            with subprocess.Popen(
                [*command, context],
                env=docker.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                for line in process.stdout:
                    lines.append(line)
                    if line.startswith(("Step ", "#", "build_horovod: ")):
                        print("  " + line.rstrip()[:120], flush=True)
        assert process.returncode == 0, "".join(lines[-60:])
        if before and before != number():
            docker("rmi", before, check=False)
        return tag

    return image


@pytest.fixture(scope="session")
def image(build):
    """The name of the built image."""
    return build(IMAGE)
