"""The check of free space before the image's tests build or copy it."""

import shutil
from types import SimpleNamespace

import pytest

import engine


@pytest.fixture
def free(monkeypatch):
    """A function that sets the GB that each disk has free."""

    def set_free(number):
        usage = SimpleNamespace(free=number * engine.GB)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    return set_free


def test_full_disk_is_an_error_of_one_line(free, tmp_path):
    free(2.96)
    with pytest.raises(pytest.fail.Exception) as caught:
        engine.require_space(tmp_path, 3, "a copy")
    assert str(caught.value) == (
        f"a copy: 2.9 GB are free in {tmp_path}; expected 3 GB. Free some. To remove the images "
        "of earlier tests: docker/local-engine.sh down; rm -r runs/local-engine runs/local-podman"
    )
    free(3)
    engine.require_space(tmp_path, 3, "a copy")


def test_engine_on_another_machine_is_not_checked(free, tmp_path):
    free(0)
    engine.require_space(tmp_path / "missing", 3, "a copy")


@pytest.mark.parametrize(("images", "fails"), [("\n", True), ("0123456789ab\n", False)])
def test_build_needs_space_only_without_the_image(free, tmp_path, images, fails):
    def docker(command, *arguments):
        return images if command == "images" else f"{tmp_path}\n"

    free(engine.BUILD_GB - 1)
    if fails:
        with pytest.raises(pytest.fail.Exception, match=f"a build .* are free in {tmp_path}; "):
            engine.require_space_to_build(docker)
    else:
        engine.require_space_to_build(docker)
