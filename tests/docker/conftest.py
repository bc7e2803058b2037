"""Fixtures of the tests of the image. Without Docker the tests are skipped."""

from pathlib import Path

import pytest

from engine import build, builder, containers, docker, engine, image, podman  # noqa: F401 (fixtures)
from engine import missing


def pytest_collection_modifyitems(items):
    if reason := missing():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
