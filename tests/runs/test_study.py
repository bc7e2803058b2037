"""A whole small study through the real command: stopped, gone on with, told, and guarded."""

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
    said, errors = process.communicate(timeout=400)
    return process.returncode, said, errors


def wait_for(found, process):
    deadline = time.monotonic() + 200
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def records(folder):
    return {
        str(path.parent.relative_to(folder / "out")): json.loads(path.read_text())
        for path in folder.glob("out/mnist/*/record.json")
        if json.loads(path.read_text())["measured"]
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that a signal stopped while it trained, and that went on from there: its folder, and what it said both times."""
    folder = tmp_path_factory.mktemp("study")
    write_images(folder / "out" / "data" / "mnist-700")
    process = start(folder)
    wait_for(lambda: (folder / "out" / "lock").exists(), process)
    second = finish(start(folder))
    wait_for(lambda: list(folder.glob("out/mnist/teacher-0/train/last.pth.tar")), process)
    process.send_signal(signal.SIGTERM)
    first = finish(process)
    left = records(folder)
    return folder, first, second, left, finish(start(folder))


def test_a_signal_stops_it_and_the_same_command_goes_on(study):
    folder, first, _, left, last = study
    assert first[0] == 0 and "stopped by a signal; the same command goes on from here" in first[1]
    assert "mnist/teacher-0" not in left  # it was training
    assert last[0] == 0, last
    assert set(records(folder)) == {
        "mnist/teacher-0",
        *(f"mnist/{arm}-{seed}" for arm in ARMS for seed in (0, 7)),
    }
    assert "11 of 11: mnist/" in last[1]


def test_ctrl_c_while_images_are_prepared_is_told_in_a_line_and_leaves_no_half_set(tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    process = start(tmp_path)
    wait_for(lambda: (tmp_path / "out" / "data" / "mnist-700.part").exists(), process)
    process.send_signal(signal.SIGINT)
    code, said, errors = finish(process)
    assert code == 0 and "stopped by a signal" in said and errors == ""
    assert not (tmp_path / "out" / "data" / "mnist-700").exists()


def test_one_study_at_a_time_in_a_folder(study):
    code, _, errors = study[2]
    assert code == 2 and "another study runs there" in errors and errors.count("\n") == 1


def test_it_shows_how_far_it_is(study):
    said = study[4][1]
    shares = [int(share) for share in re.findall(r"(\d+) % done, running", said)]
    assert shares == sorted(shares) and shares[-1] == 100
    assert re.search(
        r"\d % done, running mnist/\S+ \d+ %(, mnist/\S+ \d+ %)?; about \d+ (s|min) left", said
    )


def test_the_results_are_one_record_a_network_with_its_exact_commands(study):
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
    assert (
        records(folder)["mnist/mgd-0"]["commands"][0] in text
        and (folder / "out" / "results" / "mnist.png").exists()
    )
    assert "k-NN: " in study[4][1] and "done: the results are in" in study[4][1]


def test_a_recorded_command_gives_the_recorded_accuracy(study, tmp_path):
    folder = study[0]
    record = records(folder)["mnist/random-7"]
    command = (
        record["commands"][0]
        .replace(f"{folder}/out/mnist/random-7", str(tmp_path))
        .replace("= python", f"= {sys.executable}")
    )
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert round(of_kind(tmp_path / "train", "knn")[-1]["knn"], 2) == record["knn"]


def test_a_finished_study_trains_nothing_again(study):
    folder = study[0]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("out/mnist/*/*/*.pth.tar")}
    code, said, _ = finish(start(folder))
    assert code == 0 and "11 networks, 11 measured before" in said
    assert {
        path: path.stat().st_mtime_ns for path in folder.glob("out/mnist/*/*/*.pth.tar")
    } == before


def test_what_is_half_trained_is_not_gone_on_with_under_other_options(study, tmp_path):
    folder = study[0]
    teacher = tmp_path / "out" / "mnist" / "teacher-0"
    shutil.copytree(folder / "out" / "data", tmp_path / "out" / "data")
    shutil.copytree(folder / "out" / "mnist" / "teacher-0", teacher, symlinks=True)
    record = json.loads((teacher / "record.json").read_text()) | {"measured": False}
    (teacher / "record.json").write_text(json.dumps(record))
    code, _, errors = finish(start(tmp_path, teacher=FORM["teacher"] | {"lr": 0.5}))
    assert code == 2 and "job.train lr was 0.01, now 0.5" in errors and errors.count("\n") == 1


def test_changed_options_are_refused_and_nothing_is_removed(study):
    folder = study[0]
    before = records(folder)
    code, _, errors = finish(start(folder, linear={"epochs": 2}))
    assert (
        code == 2
        and "is of another mnist/teacher-0" in errors
        and "choose another --out" in errors
        and errors.count("\n") == 1
    )
    assert records(folder) == before


def test_a_command_that_fails_ends_the_study_with_its_own_line(study, tmp_path):
    folder = study[0]
    shutil.copytree(folder / "out", tmp_path / "out", symlinks=True)
    record = tmp_path / "out" / "mnist" / "mgd-0" / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"measured": False}))
    (tmp_path / "out" / "mnist" / "teacher-0" / "train" / "last.pth.tar").unlink()
    code, _, errors = finish(start(tmp_path))
    [line] = errors.splitlines()
    assert (
        code == 2
        and line.startswith("error: CUDA_VISIBLE_DEVICES= python -m job.train")
        and "no such file" in line
    )
    assert not json.loads(record.read_text())["measured"]
