"""A small study by the real command: stopped, resumed, locked and reported."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from runs import of_kind, write_images
from tests.unit.study.test_plan import TINY

FORM = TINY | {
    "train": {
        "image_size": 16,
        "batch_size": 8,
        "epochs": 1,
        "lr": 0.01,
        "mlp": True,
        "moco_k": 16,
        "mgd_images": 8,
        "workers": 0,
    },
    "teacher": {"arch": "resnet18", "epochs": 8},
    "linear": {"epochs": 1, "batch_size": 8, "workers": 0},
    "sets": {"mnist": {}},
    "seeds": [7],
    "split": "choose",  # which allows one seed
}
ARMS = ("untrained", "alone", "mgd", "random", "original")


def start(folder, **changed):
    (folder / "tiny.yaml").write_text(yaml.safe_dump(FORM | changed))
    command = [
        sys.executable,
        "-m",
        "job.study.study",
        f"{folder}/tiny.yaml",
        "--out",
        f"{folder}/out",
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process):
    output, errors = process.communicate(timeout=400)
    return process.returncode, output, errors


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def records(folder):
    return {
        str(path.parent.relative_to(folder / "out")): json.loads(path.read_text())
        for path in folder.glob("out/mnist/*/record.json")
        if json.loads(path.read_text())["measured"]
    }


def checkpoint_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("out/mnist/*/*/*.pth.tar")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Stop a study by a signal while it trains, and resume it.

    Return its folder, the results of its first start and of a second one at the same time, the
    records when it stopped, and the result of the resumed study.
    """
    folder = tmp_path_factory.mktemp("study")
    write_images(folder / "out" / "data" / "mnist-700-choose")
    process = start(folder)
    wait_for(lambda: (folder / "out" / "lock").exists(), process)
    second = finish(start(folder))
    wait_for(lambda: list(folder.glob("out/mnist/teacher-7/train/last.pth.tar")), process)
    process.send_signal(signal.SIGTERM)
    first = finish(process)
    left = records(folder)
    return folder, first, second, left, finish(start(folder))


def test_signal_stops_and_same_command_resumes(study):
    folder, first, _, left, last = study
    assert first[0] == 0 and "stopped by a signal; the same command resumes the study" in first[1]
    assert "mnist/teacher-7" not in left  # it was training
    assert last[0] == 0, last
    students = {f"mnist/{arm}-7" for arm in ARMS}
    assert set(records(folder)) == {"mnist/teacher-7", *students}
    assert "6 of 6: mnist/" in last[1]


def test_ctrl_c_while_preparing_leaves_no_set(tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    process = start(tmp_path)
    wait_for(lambda: (tmp_path / "out" / "data" / "mnist-700-choose.part").exists(), process)
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 0 and "stopped by a signal" in output and errors == ""
    assert not (tmp_path / "out" / "data" / "mnist-700-choose").exists()


def test_folder_is_locked(study):
    code, _, errors = study[2]
    assert code == 2 and "another study runs there" in errors and errors.count("\n") == 1


def test_progress_is_printed(study):
    output = study[4][1]
    percents = [int(percent) for percent in re.findall(r"(\d+) % done, running", output)]
    assert percents == sorted(percents) and percents[-1] == 100
    network = r"mnist/\S+ \d+ %"
    line = rf"\d % done, running {network}(, {network})?; about \d+ (s|min) left"
    assert re.search(line, output)


def test_results_have_a_record_for_each_network(study):
    folder = study[0]
    for name, record in records(folder).items():
        assert json.loads((folder / "out" / "results" / f"{name}.json").read_text()) == record
        assert 0 <= record["knn"] <= 100 and 0 <= record["linear"] <= 100 and record["seconds"] > 0
        for command in record["commands"]:
            assert command.startswith("CUDA_VISIBLE_DEVICES= python -m job.")
        assert ("pull_first" in record and record["pull_first"] > 0) == (
            record["arm"] in ("mgd", "random", "original")
        )
        assert ("loss_factor" in record and record["loss_factor"] > 0) == (
            record["arm"] in ("mgd", "random")
        )
    text = (folder / "out" / "results" / "README.md").read_text()
    assert records(folder)["mnist/mgd-7"]["commands"][0] in text
    assert (folder / "out" / "results" / "mnist.png").exists()
    assert "k-NN: " in study[4][1] and "done: the results are in" in study[4][1]


def test_recorded_command_gives_recorded_accuracy(study, tmp_path):
    folder = study[0]
    record = records(folder)["mnist/random-7"]
    command = (
        record["commands"][0]
        .replace(f"{folder}/out/mnist/random-7", str(tmp_path))
        .replace("= python", f"= {sys.executable}")
    )
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert round(of_kind(tmp_path / "train", "knn")[-1]["knn"], 2) == record["knn"]


def test_finished_study_trains_no_network_again(study):
    folder = study[0]
    before = checkpoint_times(folder)
    code, output, _ = finish(start(folder))
    assert code == 0 and "6 networks, 6 measured before" in output
    assert checkpoint_times(folder) == before


def test_unfinished_run_refuses_other_options(study, tmp_path):
    folder = study[0]
    teacher = tmp_path / "out" / "mnist" / "teacher-7"
    shutil.copytree(folder / "out" / "data", tmp_path / "out" / "data")
    shutil.copytree(folder / "out" / "mnist" / "teacher-7", teacher, symlinks=True)
    record = json.loads((teacher / "record.json").read_text()) | {"measured": False}
    (teacher / "record.json").write_text(json.dumps(record))
    code, _, errors = finish(start(tmp_path, teacher=FORM["teacher"] | {"lr": 0.5}))
    assert code == 2 and "job.train lr was 0.01, now 0.5" in errors and errors.count("\n") == 1


def test_changed_options_are_refused(study):
    folder = study[0]
    before = records(folder)
    code, _, errors = finish(start(folder, linear={"epochs": 2}))
    assert code == 2 and errors.count("\n") == 1
    assert "of another mnist/teacher-7" in errors and "Choose another --out" in errors
    assert records(folder) == before


def test_failed_command_ends_the_study_with_its_error(study, tmp_path):
    folder = study[0]
    shutil.copytree(folder / "out", tmp_path / "out", symlinks=True)
    record = tmp_path / "out" / "mnist" / "mgd-7" / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"measured": False}))
    (tmp_path / "out" / "mnist" / "teacher-7" / "train" / "last.pth.tar").unlink()
    code, _, errors = finish(start(tmp_path))
    [line] = errors.splitlines()
    assert code == 2 and "no such file" in line
    assert line.startswith("error: CUDA_VISIBLE_DEVICES= python -m job.train")
    assert not json.loads(record.read_text())["measured"]
