"""Mark all tests of this folder as `run`."""

from pathlib import Path

import pytest

from runs import write_teacher


@pytest.fixture(scope="session")
def narrow_teacher(tmp_path_factory):
    """A teacher file: a narrow ResNet-18 with the small stem and random weights."""
    path = tmp_path_factory.mktemp("narrow") / "teacher.pth.tar"
    return write_teacher(path, "resnet18", stem="small", width=32)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.run)
