""".ci/run up to its first test: its user, and the packages that it installs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci/run"
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
def installs(tmp_path):
    """A function that runs .ci/run with packages in given states and returns those it installs."""
    for name, code in (
        ("apt-get", f'echo "$@" >>{tmp_path}/apt-get.txt'),
        ("make", "exit 1"),
        ("id", "echo 0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DPKG_ADMINDIR": str(tmp_path),
    }

    def run(states):
        entry = "Package: {}\nStatus: {}\nVersion: 1\nArchitecture: all\n"
        entry += "Maintainer: x\nDescription: x\n\n"
        (tmp_path / "status").write_text(
            "".join(entry.format(name, STATES[state]) for name, state in states.items())
        )
        subprocess.run([SCRIPT], env=environment, capture_output=True, check=False)
        log = tmp_path / "apt-get.txt"
        return log.read_text().splitlines()[-1].split()[3:] if log.exists() else []

    return run


def test_ci_run_skips_installed_packages(installs):
    assert installs(dict.fromkeys(PACKAGES, "installed")) == []


@pytest.mark.parametrize("state", ["removed", "halfway"])
def test_ci_run_installs_missing_packages(installs, state):
    states = dict.fromkeys(PACKAGES, "installed") | {"munge": state}
    del states["chromium"]
    assert installs(states) == ["munge", "chromium"]
