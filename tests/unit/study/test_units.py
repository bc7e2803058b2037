"""A unit's commands, identity and record."""

import json

import pytest
import yaml

from job.errors import RunError
from job.study.plan import read_plan
from job.study.units import Bench, difference
from tests.unit.study.test_plan import TINY


def make_bench(tmp_path, images="aaaa", **changed):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changed))
    return Bench(
        read_plan(str(path)), tmp_path / "out", dict.fromkeys(("mnist", "clipart"), images)
    )


def unit_of(bench, name):
    return next(unit for unit in bench.plan.units if unit.name == name)


def identity(name, tmp_path, **changed):
    bench = make_bench(tmp_path, **changed)
    return bench.identity(unit_of(bench, name))


def test_commands_are_as_a_user_types_them(tmp_path):
    bench = make_bench(tmp_path)
    train, linear = map(bench.shown, bench.commands(unit_of(bench, "clipart/random-7")).values())
    out = tmp_path / "out"
    program = "CUDA_VISIBLE_DEVICES= python -m job.train"
    assert train.startswith(f"{program} {out}/data/clipart-700 --knn-every 1 ")
    teacher, folder = out / "clipart/teacher-0/train/last.pth.tar", out / "clipart/random-7"
    assert "--image-size 32 " in train
    assert f"--matching random --seed 7 --teacher {teacher} --out {folder}/train" in train
    files = f"--pretrained {folder}/train/last.pth.tar --out {folder}/linear --resume auto"
    assert files in linear
    alone, untrained = (
        bench.shown(bench.commands(unit_of(bench, name))["train"])
        for name in ("clipart/alone-7", "mnist/untrained-0")
    )
    assert "--teacher" not in alone
    assert all(text in untrained for text in ("--lr 0.0 ", "--epochs 1 ", "--warmup-epochs 0 "))


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
def test_identity_changes_with_options_and_data(tmp_path, name, changed):
    assert identity(name, tmp_path) != identity(name, tmp_path, **changed)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (  # no effect on results, or a default
            "mnist/alone-0",
            {"train": TINY["train"] | {"workers": 1, "print_freq": 100, "moco_t": 0.07}},
        ),
        ("mnist/alone-0", {"teacher": {"arch": "resnet50", "epochs": 4}}),
        ("mnist/alone-0", {"train": TINY["train"] | {"loss_share": 0.3, "margins": "init"}}),
        ("mnist/mgd-0", {"seeds": [0, 1, 2], "at_once": 1, "about": "another"}),
    ],
)
def test_identity_ignores_options_without_effect(tmp_path, name, changed):
    assert identity(name, tmp_path) == identity(name, tmp_path, **changed)


def written(bench, name, **changed):
    """Write the record of a unit. Return the unit."""
    unit = unit_of(bench, name)
    record = {
        "identity": bench.identity(unit),
        "measured": "2030-01-01",
        "on": "a machine",
        "commands": [],
    }
    record |= {"knn": 1.0, "linear": 2.0, "seconds": 3.0} | changed
    bench.folder(unit).mkdir(parents=True)
    (bench.folder(unit) / "record.json").write_text(json.dumps(record))
    return unit


def test_record_belongs_to_its_unit(tmp_path):
    bench = make_bench(tmp_path)
    unit = written(bench, "mnist/mgd-0")
    assert bench.record(unit)["linear"] == 2.0
    assert bench.record(unit_of(bench, "mnist/mgd-7")) is None
    assert bench.record(written(bench, "mnist/alone-0", measured=False)) is None
    later = make_bench(tmp_path, linear={"epochs": 9})
    for name in ("mnist/alone-0", "mnist/mgd-0"):  # unfinished, measured
        problem = rf"of another {name}: job\.linear epochs was 1, now 9; expected the same options"
        with pytest.raises(RunError, match=rf"{problem}.*\. Choose another --out, or remove"):
            later.record(unit_of(later, name))


def test_record_without_a_newer_option_has_its_default(tmp_path):
    bench = make_bench(tmp_path)
    unit = written(bench, "mnist/mgd-0")
    path = bench.folder(unit) / "record.json"
    record = json.loads(path.read_text())
    for name, default in (("mgd_correction", False), ("gram_stages", [1, 2, 3, 4])):
        assert record["identity"]["job.train"].pop(name) == default
    path.write_text(json.dumps(record))
    assert bench.record(unit)["linear"] == 2.0
    del record["identity"]["job.train"]["loss_share"]
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"job\.train loss_share was 10\.0, now 0\.1"):
        bench.record(unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        '{"identity": {}, "measured": "x", "knn": "high", "linear": 1, "seconds": 1, '
        '"commands": [], "on": ""}',
    ],
)
def test_damaged_record_is_an_error(tmp_path, text):
    bench = make_bench(tmp_path)
    unit = written(bench, "mnist/mgd-0")
    (bench.folder(unit) / "record.json").write_text(text)
    with pytest.raises(RunError, match="record.json: damaged"):
        bench.record(unit)


def test_concurrent_networks_divide_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    assert make_bench(tmp_path, at_once=2).environment()["OMP_NUM_THREADS"] == "3"
    assert make_bench(tmp_path, at_once=9).environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert make_bench(tmp_path).environment()["OMP_NUM_THREADS"] == "5"


def test_difference_is_the_first_option():
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a c was 2, now 3"
    assert difference({"teacher": "x"}, {}) == "teacher was x, now None"
