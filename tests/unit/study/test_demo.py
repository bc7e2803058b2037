"""The demo: its folder, its commands, the kill of a worker, and its table."""

import json
import subprocess
import sys

import pytest

from job.config import Config, LinearConfig, read_config
from job.errors import RunError
from job.study import data, demo


def record(folder, **values):
    """Write a run's folder with one record."""
    folder.mkdir(parents=True)
    common = {"time": 1.0, "epoch": 0, "step": 1, "steps": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(common | values) + "\n")


def test_table_has_a_bar_for_each_network(tmp_path):
    listed = demo.networks(tmp_path)
    for number, network in enumerate(listed):
        record(tmp_path / network.name, kind="knn", knn=50.0 + number)
        linear = 100.0 if network.name == "teacher" else 10.0 * number
        record(tmp_path / f"{network.name}-linear", kind="validation", val_top1=linear)
    lines = demo.table(listed, demo.accuracies(tmp_path, listed))
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "student, untrained",
        "student without teacher",
        "student with MGD",
        "teacher, twice as wide",
    ]
    assert [line.count(lines[-1][-1]) for line in lines[1:]] == [4, 8, 12, demo.BAR]
    assert "53.0 %" in lines[3] and "30.0 %" in lines[3]


def test_options_are_those_of_the_programs(tmp_path):
    for network in demo.networks(tmp_path):
        config = read_config(["DIR", "--config", "demo", *network.options])
        assert config.width == (32 if network.name == "teacher" else 16)
        assert bool(config.teacher) == (network.name == "mgd")
    assert isinstance(config, Config)
    assert read_config(["DIR", "--config", "linear-demo"], kind=LinearConfig).epochs > 1


def test_earlier_demo_is_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "runs" / "demo"
    demo.clear(folder)
    (folder / "mgd").mkdir()
    demo.clear(folder)
    assert not (folder / "mgd").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(RunError, match="mine: not empty"):
        demo.clear(tmp_path / "mine")
    with pytest.raises(RunError, match="File exists|Not a directory"):
        demo.clear(tmp_path / "mine" / "thesis.tex")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(RunError, match="link: Cannot call rmtree on a symbolic link; expected"):
        demo.clear(tmp_path / "link")


def test_images_need_a_writable_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.SETS, "mnist", lambda folder, log: folder.mkdir(parents=True))
    (tmp_path / "data").touch()
    with pytest.raises(SystemExit) as caught:
        demo.main(["out"])
    problem = "data/mnist.part: Not a directory; expected a writable folder"
    fix = "Start the demo in another folder: it writes data/mnist there"
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {problem}. {fix}\n"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupted)
    with pytest.raises(SystemExit) as caught:
        demo.main([])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C. The next demo starts again\n"


def test_failed_command_ends_the_demo(capfd):
    with pytest.raises(RunError, match=r"python -m job.train missing: exit code 2"):
        demo.run(["job.train", "missing"], workers=1)
    shown = capfd.readouterr().out
    assert shown.startswith("$ python -m job.train missing\n") and "no such" in shown


def test_missing_launcher_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "BIN", tmp_path)
    with pytest.raises(RunError, match="horovodrun: missing; expected Horovod"):
        demo.run(["job.train", "missing"])


def test_output_is_shown_without_the_launchers_prefix(capfd):
    lines = "[0]<stdout>:epoch 1\\n[1]<stderr>:epoch 2 step 3\\nrest"
    process = subprocess.Popen(
        [sys.executable, "-c", f"print('{lines}')"], stdout=subprocess.PIPE, text=True
    )
    assert demo.show(process, until="epoch 2 ")
    assert not demo.show(process)
    assert capfd.readouterr().out == "epoch 1\nepoch 2 step 3\nrest\n"
