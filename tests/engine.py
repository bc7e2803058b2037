"""A real Docker engine, and the image built on it, on a base made here: nothing is fetched from an image registry."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
NEEDED = {"docker": "docker.io", "dockerd": "docker.io", "debootstrap": "debootstrap"}


def missing() -> str:
    """What has to be installed before these fixtures can be used, or nothing."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    packages = {package for name, package in NEEDED.items() if not shutil.which(name, path=path)}
    return f"no Docker to test with here: apt-get install {' '.join(sorted(packages))}" if packages else ""


@pytest.fixture(scope="session")
def engine():
    """The environment in which docker reaches an engine; one that was started for it is stopped at the end."""
    script = REPO / "docker/local-engine.sh"
    before = subprocess.run([script, "status"], capture_output=True, text=True, timeout=60)
    up = subprocess.run([script, "up"], stdout=subprocess.PIPE, text=True, timeout=600)
    assert up.returncode == 0, "local-engine.sh up has failed; its words are above"
    exports = dict(word.split("=", 1) for word in shlex.split(up.stdout) if word != "export")
    assert set(exports) == {"DOCKER_HOST", "BASE_IMAGE"}
    yield os.environ | exports
    if before.returncode == 3:
        subprocess.run([script, "down"], check=True, timeout=120)


@pytest.fixture(scope="session")
def docker(engine):
    """A function that runs a docker command and returns what it prints."""

    def command(*words, check=True, timeout=120, **more):
        words = ["docker", *map(str, words)]
        done = subprocess.run(words, env=engine, cwd=REPO, capture_output=True, text=True, timeout=timeout, **more)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command.engine = engine
    return command


@pytest.fixture(scope="session")
def build(engine, pytestconfig):
    """A function that builds docker/Dockerfile, and shows how far it is; what is built already is taken from the cache."""

    def image(tag, context=REPO):
        words = ["docker", "build", "--network=host", "-f", context / "docker/Dockerfile", "-t", tag]
        for name, value in (("BASE_IMAGE", engine["BASE_IMAGE"]), ("RUNTIME_IMAGE", engine["BASE_IMAGE"]), ("VERSION", "test")):
            words += ["--build-arg", f"{name}={value}"]

        def number():
            return subprocess.run(["docker", "images", "--quiet", tag], env=engine, capture_output=True, text=True).stdout.strip()

        before = number()
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nbuilding {tag} (about 7 minutes where nothing is in the cache)", flush=True)
            lines = []
            with subprocess.Popen(
                [*words, context], env=engine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                for line in process.stdout:
                    lines.append(line)
                    if line.startswith(("Step ", "#", "build_horovod: ")):
                        print("  " + line.rstrip()[:120], flush=True)
        assert process.returncode == 0, "".join(lines[-60:])
        if before and before != number():
            subprocess.run(["docker", "rmi", before], env=engine, capture_output=True)
        return tag

    return image


@pytest.fixture(scope="session")
def image(build):
    """The name of the built image."""
    return build("moco-mgd:test")
