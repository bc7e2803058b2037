"""Tests of the image and of runs in it are skipped where there is no Docker."""

from pathlib import Path

import pytest

from engine import build, containers, docker, engine, image, missing, podman  # noqa: F401 (fixtures)


def pytest_collection_modifyitems(items):
    if reason := missing():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
