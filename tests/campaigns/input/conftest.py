"""Fixtures for tests of bad input: commands in separate processes, and a folder of images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cases import Outcome, fill


@pytest.fixture(scope="session")
def run_all():
    """A function that runs command lines (program, argv, folder, unprivileged).

    It returns their outcomes in the same order.
    """
    with subprocess.Popen(
        [sys.executable, Path(__file__).parent / "starter.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:

        def run(commands):
            starter.stdin.write(json.dumps(commands) + "\n")
            starter.stdin.flush()
            return [Outcome(outcome) for outcome in json.loads(starter.stdout.readline())]

        yield run
        starter.stdin.close()


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A folder of eight training and four validation images in two classes."""
    folder = tmp_path_factory.mktemp("good")
    for name in "ab":
        fill(folder / "train" / name, 4)
        fill(folder / "val" / name, 2)
    return folder


@pytest.fixture(scope="module")
def values(good):
    """The values of the {names} in a case."""
    return {"good": good}


@pytest.fixture(scope="module")
def outcomes(request, run_all, values, tmp_path_factory):
    """The outcome and the folder of each of the module's selected cases, by name."""
    chosen = [
        item
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    cases = [item.callspec.params["case"] for item in chosen if "case" in item.callspec.params]
    folders = [tmp_path_factory.mktemp("run") for _ in cases]
    argvs = [[str(word).format(**values) for word in case.argv] for case in cases]
    commands = [
        (case.program, argv, str(folder), case.unprivileged)
        for case, argv, folder in zip(cases, argvs, folders, strict=True)
    ]
    ended = zip(run_all(commands), folders, strict=True)
    return dict(zip([case.name for case in cases], ended, strict=True))
