""".ci/run without its tests: its user, the packages that it installs, and its commands."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci/run"
PACKAGES = re.findall(
    r"[\w.+-]+",
    re.sub("#.*", "", re.search(r"packages=\((.*?)\n\)", SCRIPT.read_text(), re.DOTALL)[1]),
)
STATES = {
    "installed": "install ok installed",
    "removed": "deinstall ok config-files",
    "halfway": "install ok half-configured",
}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start programs as another user")
def test_ci_run_refuses_users():
    command = ["setpriv", "--reuid=65534", "--clear-groups", "bash"]
    done = subprocess.run(command, input=SCRIPT.read_text(), capture_output=True, text=True)
    line = ".ci/run: expected root, to install packages and start SLURM and Docker. "
    line += "Run sudo .ci/run\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.fixture
def ci_run(tmp_path):
    """A function that runs .ci/run with packages in given states. No program does anything.

    `make` fails with the arguments `failing`. apt-get.txt and make.txt have the arguments.
    """
    for name, code in (
        ("apt-get", f'echo "$@" >>{tmp_path}/apt-get.txt'),
        ("make", f'echo "$@" >>{tmp_path}/make.txt; [ "$*" != "$FAILING" ]'),
        ("id", "echo 0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DPKG_ADMINDIR": str(tmp_path),
    }

    def run(states, failing=""):
        entry = "Package: {}\nStatus: {}\nVersion: 1\nArchitecture: all\n"
        entry += "Maintainer: x\nDescription: x\n\n"
        (tmp_path / "status").write_text(
            "".join(entry.format(name, STATES[state]) for name, state in states.items())
        )
        variables = environment | {"FAILING": failing}
        return subprocess.run([SCRIPT], env=variables, capture_output=True, text=True)

    return run


@pytest.fixture
def installs(ci_run, tmp_path):
    """A function that runs .ci/run with packages in given states and returns those it installs."""

    def run(states):
        ci_run(states, failing="lint")
        log = tmp_path / "apt-get.txt"
        return log.read_text().splitlines()[-1].split()[3:] if log.exists() else []

    return run


def test_ci_run_calls_all_test_commands(ci_run, tmp_path):
    """It calls the short form of each campaign."""
    done = ci_run(dict.fromkeys(PACKAGES, "installed"))
    assert (done.returncode, done.stderr) == (0, "")
    called = (tmp_path / "make.txt").read_text().splitlines()
    makefile = (ROOT / "Makefile").read_text()
    campaigns = set(re.findall(r"^(test-\S+):", makefile, re.MULTILINE))
    campaigns -= {"test-soak", "test-gpu"}  # hours, and a GPU
    assert set(called) == {
        "lint",
        "test",
        "bench-quick",
        *(f"{name} SHORT=1" for name in campaigns),
    }
    assert re.findall(r"^\.ci/run: make (.*): \d+ s$", done.stdout, re.MULTILINE) == called


def test_ci_run_ends_at_the_first_failure(ci_run, tmp_path):
    done = ci_run(dict.fromkeys(PACKAGES, "installed"), failing="test-slurm SHORT=1")
    assert done.returncode == 1
    assert (tmp_path / "make.txt").read_text().endswith("\ntest-slurm SHORT=1\n")


def test_ci_run_skips_installed_packages(installs):
    assert installs(dict.fromkeys(PACKAGES, "installed")) == []


@pytest.mark.parametrize("state", ["removed", "halfway"])
def test_ci_run_installs_missing_packages(installs, state):
    states = dict.fromkeys(PACKAGES, "installed") | {"munge": state}
    del states["chromium"]
    assert installs(states) == ["munge", "chromium"]
