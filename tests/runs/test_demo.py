"""The demo with few images: a worker is killed, the run is resumed, and the table is complete."""

import pytest

from job.study import demo
from runs import of_kind

SMALL = "--image-size 8 --epochs 3 --batch-size 8 --moco-k 16 --knn-every 3".split()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder and the output of a demo with 20 images of a class."""
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MOST", 20)
        patch.setattr(demo, "IMAGES", folder / "mnist")
        patch.setattr(demo, "say", lines.append)
        networks = demo.networks(folder / "runs")
        small = [network._replace(options=[*network.options, *SMALL]) for network in networks]
        patch.setattr(demo, "networks", lambda _: small)
        demo.demo(folder / "runs", 3)
    return folder / "runs", lines


def test_killed_run_is_resumed_to_its_end(shown):
    folder, lines = shown
    starts = of_kind(folder / "mgd", "start")
    assert len(starts) == 2 and starts[-1]["options"]["seed"] == 3
    killed = next(number for number, line in enumerate(lines) if "kill -9" in line)
    assert lines[killed - 1].startswith(demo.KILL_AT)
    assert any("resuming from" in line for line in lines[killed:])
    assert (folder / "mgd" / "complete").exists()


def test_table_is_of_all_networks(shown):
    folder, lines = shown
    knn = of_kind(folder / "mgd", "knn")[-1]["knn"]
    row = next(line for line in reversed(lines) if line.startswith("student with MGD"))
    assert f" {knn:.1f} %" in row
    assert (folder / "report.html").stat().st_size > 100_000
    assert str(folder / "report.html") in lines[-1]
