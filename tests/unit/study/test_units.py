"""From a unit to its commands and its identity."""

import json

import pytest
import yaml

from job.errors import RunError
from job.study.plan import read_plan
from job.study.units import Bench, difference
from tests.unit.study.test_plan import TINY


def bench(tmp_path, images="aaaa", **changed):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changed))
    return Bench(
        read_plan(str(path)), tmp_path / "out", dict.fromkeys(("mnist", "clipart"), images)
    )


def unit(found, name):
    return next(unit for unit in found.plan.units if unit.name == name)


def identity(name, tmp_path, **changed):
    found = bench(tmp_path, **changed)
    return found.identity(unit(found, name))


def test_commands_are_those_a_person_would_type(tmp_path):
    found = bench(tmp_path)
    train, linear = map(found.shown, found.commands(unit(found, "clipart/random-7")).values())
    out = tmp_path / "out"
    assert train.startswith(
        f"CUDA_VISIBLE_DEVICES= python -m job.train {out}/data/clipart-700 --knn-every 1 "
    )
    assert "--image-size 32 " in train
    assert (
        f"--matching random --seed 7 --teacher {out}/clipart/teacher-0/train/last.pth.tar --out {out}/clipart/random-7/train"
        in train
    )
    assert (
        f"--pretrained {out}/clipart/random-7/train/last.pth.tar --out {out}/clipart/random-7/linear --resume auto"
        in linear
    )
    assert "--teacher" not in found.shown(found.commands(unit(found, "clipart/alone-7"))["train"])
    still = found.shown(found.commands(unit(found, "mnist/untrained-0"))["train"])
    assert "--lr 0.0 " in still and "--epochs 1 " in still and "--warmup-epochs 0 " in still


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mnist/alone-0", {"train": TINY["train"] | {"lr": 0.3}, "sets": {"mnist": {}}}),
        ("mnist/alone-0", {"linear": {"epochs": 2}}),
        ("mnist/alone-0", {"images": "bbbb"}),
        ("mnist/alone-0", {"device": "gpu"}),
        ("mnist/mgd-0", {"teacher": {"arch": "resnet50", "epochs": 4}}),  # of its teacher
        ("mnist/untrained-0", {"train": TINY["train"] | {"image_size": 40}}),
    ],
)
def test_an_identity_changes_with_what_results_follow_from(tmp_path, name, changed):
    assert identity(name, tmp_path) != identity(name, tmp_path, **changed)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (
            "mnist/alone-0",
            {"train": TINY["train"] | {"workers": 1, "print_freq": 100, "moco_t": 0.07}},
        ),  # no results, or a default
        ("mnist/alone-0", {"teacher": {"arch": "resnet50", "epochs": 4}}),
        ("mnist/alone-0", {"train": TINY["train"] | {"loss_share": 0.3, "margins": "init"}}),
        ("mnist/mgd-0", {"seeds": [0, 1, 2], "at_once": 1, "about": "another"}),
    ],
)
def test_an_identity_stays_with_what_they_do_not(tmp_path, name, changed):
    assert identity(name, tmp_path) == identity(name, tmp_path, **changed)


def written(found, name, **changed):
    one = unit(found, name)
    record = {
        "identity": found.identity(one),
        "measured": "2030-01-01",
        "on": "a machine",
        "commands": [],
    }
    record |= {"knn": 1.0, "linear": 2.0, "seconds": 3.0} | changed
    found.folder(one).mkdir(parents=True)
    (found.folder(one) / "record.json").write_text(json.dumps(record))
    return one


def test_a_record_is_taken_for_the_unit_that_it_is_of(tmp_path):
    found = bench(tmp_path)
    one = written(found, "mnist/mgd-0")
    assert found.record(one)["linear"] == 2.0
    assert found.record(unit(found, "mnist/mgd-7")) is None
    assert (
        written(found, "mnist/alone-0", measured=False)
        and found.record(unit(found, "mnist/alone-0")) is None
    )
    later = bench(tmp_path, linear={"epochs": 9})
    with pytest.raises(
        RunError, match="of another mnist/alone-0"
    ):  # begun, and not to be gone on with
        later.record(unit(later, "mnist/alone-0"))
    with pytest.raises(
        RunError,
        match=r"of another mnist/mgd-0: job\.linear epochs was 1, now 9; choose another --out, or remove",
    ):
        later.record(unit(later, "mnist/mgd-0"))


def test_a_record_of_before_an_option_was_added_has_its_default(tmp_path):
    found = bench(tmp_path)
    one = written(found, "mnist/mgd-0")
    path = found.folder(one) / "record.json"
    record = json.loads(path.read_text())
    for name, default in (("mgd_correction", False), ("gram_stages", [1, 2, 3, 4])):
        assert record["identity"]["job.train"].pop(name) == default
    path.write_text(json.dumps(record))
    assert found.record(one)["linear"] == 2.0
    del record["identity"]["job.train"]["loss_share"]
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"job\.train loss_share was 10\.0, now 0\.1"):
        found.record(one)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        '{"identity": {}, "measured": "x", "knn": "high", "linear": 1, "seconds": 1, "commands": [], "on": ""}',
    ],
)
def test_a_damaged_record_is_told(tmp_path, text):
    found = bench(tmp_path)
    one = written(found, "mnist/mgd-0")
    (found.folder(one) / "record.json").write_text(text)
    with pytest.raises(RunError, match="is damaged"):
        found.record(one)


def test_networks_at_once_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    assert bench(tmp_path, at_once=2).environment()["OMP_NUM_THREADS"] == "3"
    assert bench(tmp_path, at_once=9).environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert bench(tmp_path).environment()["OMP_NUM_THREADS"] == "5"


def test_difference_names_the_first():
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a c was 2, now 3"
    assert difference({"teacher": "x"}, {}) == "teacher was x, now None"
