"""Losses of any framework in records, event files, panel, report and study."""

import json
import re
from types import SimpleNamespace

import pytest

from job.metrics.events import Events
from job.metrics.schema import ratio
from job.show.read.history import losses_of
from job.show.read.runs import find_runs
from job.show.report import curves, tables
from job.show.watch.panel import ASCII, block
from job.study import units

NAMES = {
    "moco": {"contrastive": 2.0},
    "none": {},
    "toy": {"colour": 1.5, "shape": 0.5},
    "no teacher": {"contrastive": 2.0},
    "earlier": {"contrastive": 2.0},  # a run of an earlier version
    "simsiam": {"cosine": -0.75},
}
METRICS = {"toy": {"close": 0.5}, "none": {}, "simsiam": {}}
STEPS = 4


def step(name, number=0):
    """Return the record of a step, as in `job.train`."""
    distillation = 0.0 if name == "no teacher" else 6.0
    losses = (
        NAMES[name]
        | {"distillation": distillation}
        | ({"one": 2.0, "two": 4.0} if name == "toy" else {})
    )
    total = sum(NAMES[name].values()) + distillation
    position = {"steps": number + 1, "epoch": 0, "step": number}
    speed = {"lr": 0.1, "images_per_s": 20.0, "data_wait": 0.1}
    metrics = METRICS.get(name, {"accuracy": 10.0})
    return position | {"loss": total} | {"gradient_norm": 1.0} | metrics | losses | speed


def write_run(folder, name):
    signs = {"steps": STEPS, "epoch": 0, "step": STEPS - 1, "feature_std": 0.5, "dead_layer4": 0.0}
    signs |= {"queue_rank": 7.0} if "contrastive" in NAMES[name] else {}
    folder.mkdir()
    options = {"arch": "resnet18", "epochs": 1, "batch_size": 10, "moco_k": 64}
    (folder / "config.yaml").write_text(json.dumps(options))
    lines = [step(name, number) for number in range(STEPS)] + [signs]
    start = {
        "time": 1.8e9,
        "epoch": 0,
        "step": 0,
        "options": options,
        "workers": 1,
        "nodes": 1,
        "images": 40,
    }
    start |= {"kind": "start", "steps_an_epoch": STEPS, "losses": list(NAMES[name])}
    knn = {"kind": "knn", "epoch": 1, "knn": 50.0} | (
        {"knn_auc": 0.75} if name == "simsiam" else {}
    )
    lines = lines if name == "earlier" else [start, *lines, knn]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_ratio_is_to_sum_of_framework_losses():
    expected = {"moco": 3.0, "none": None, "toy": 3.0, "no teacher": None, "earlier": 3.0}
    expected["simsiam"] = 6.0  # of a range of 1
    assert {name: ratio(step(name), losses) for name, losses in NAMES.items()} == expected
    assert ratio({"loss": 1.0, "top1": 3.0}, []) is None


def test_events_have_ratio(monkeypatch):
    actual = {}
    for name in NAMES:
        shown = []
        monkeypatch.setattr(Events, "__init__", lambda *_: None)
        monkeypatch.setattr(
            Events, "show", lambda self, position, *values, shown=shown: shown.extend(values)
        )
        events = Events()
        events.every, events.losses, events.count = (
            1,
            list(NAMES[name]),
            SimpleNamespace(an_epoch=STEPS),
        )
        events.record(step(name))
        actual[name] = [value["simple_value"] for value in shown if value["tag"] == "steps/ratio"]
    expected = {"moco": [3.0], "none": [], "toy": [3.0], "no teacher": [], "earlier": [3.0]}
    assert actual == expected | {"simsiam": [6.0]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each framework, as a report reads it, by name."""
    folder = tmp_path_factory.mktemp("runs")
    return {run.label: run for run in find_runs([write_run(folder / name, name) for name in NAMES])}


def test_history_has_losses_of_start(runs):
    """Names without numbers do not count. A run of an earlier version has MoCo's losses."""
    assert {name: run.history.losses for name, run in runs.items()} == {
        name: list(losses) for name, losses in NAMES.items()
    }
    assert losses_of({"losses": ["one", "two", "one"]}, {"two", "one", "loss"}) == ["one", "two"]
    assert losses_of({}, {"loss", "top1"}) == []


@pytest.mark.parametrize(
    ("name", "parts", "accuracy"),
    [
        ("moco", "contrastive 2 + distillation 6, ratio 3.00", True),
        ("none", None, False),
        ("toy", "colour 1.5 + shape 0.5 + distillation 6, ratio 3.00", False),
        ("no teacher", None, True),
        ("earlier", "contrastive 2 + distillation 6, ratio 3.00", True),
        ("simsiam", "cosine -0.75 + distillation 6, ratio 6.00", False),
    ],
)
def test_panel_shows_losses_by_name(runs, name, parts, accuracy):
    lines = [line.strip() for line in block(runs[name].progress, None, "", 100, ASCII)]
    assert [line for line in lines if "distillation" in line] == ([parts] if parts else [])
    assert any("10.0 % contrast accuracy" in line for line in lines) == accuracy
    assert any("rank 7.0" in line for line in lines) == accuracy
    assert any("AUC 0.750" in line for line in lines) == (name == "simsiam")
    assert not any("nan" in line or "training top-1" in line for line in lines)


def test_report_has_panels_of_framework(runs):
    """Without a framework, the ratio is absent. Only MoCo has a loss of guessing."""
    none, toy, moco, simsiam = ([runs[name]] for name in ("none", "toy", "moco", "simsiam"))
    assert curves.terms(none) is curves.accuracy(none) is curves.accuracy(toy) is None
    assert curves.guessing(none) == curves.guessing(toy) == {} and list(
        curves.guessing(moco).values()
    ) == [64]
    assert (
        "framework's loss (colour + shape)" in curves.terms(toy).reading
        and "framework's loss (contrastive)" in curves.terms(moco).reading
    )
    assert "ln(K + 1)" not in curves.loss(none).reading and "ln(K + 1)" in curves.loss(moco).reading
    assert "rank" not in curves.collapse(none).reading and "rank" in curves.collapse(moco).reading
    for draw in (curves.loss, curves.terms, curves.neighbours, curves.collapse):
        assert not re.search(r"MoCo|ln\(|rank|contrast", draw(simsiam).reading)
    assert "SimSiam" in curves.loss(simsiam).reading and "SimSiam" not in curves.loss(moco).reading
    assert (
        "AUC" in curves.neighbours(simsiam).reading and "AUC" not in curves.neighbours(moco).reading
    )
    every = list(runs.values())
    pictures = [
        curves.terms(every),
        curves.accuracy(every),
        curves.collapse(every),
        curves.loss(every),
    ]
    for picture in (*pictures, curves.neighbours(every)):
        assert picture.png.startswith(b"\x89PNG")
    assert all(part in curves.terms(every).reading for part in ("contrastive", "colour"))


def test_overview_has_ratio_and_accuracy(runs):
    table = tables.overview(list(runs.values()))
    columns = [table.head.index(name) for name in ("ratio", "contrast acc.")]
    actual = {row[0]: [row[column] for column in columns] for row in table.rows}
    assert actual == {
        "moco": ["3.00", "10.0 %"],
        "none": ["-", "-"],
        "toy": ["3.00", "-"],
        "no teacher": ["-", "10.0 %"],
        "earlier": ["3.00", "10.0 %"],
        "simsiam": ["6.00", "-"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_study_records_ratio(tmp_path, name):
    folder = write_run(tmp_path / "train", name)
    with open(folder / "metrics.jsonl", "a") as file:
        auc = {} if name == "earlier" else {"knn_auc": 0.61234}
        file.write(json.dumps({"epoch": 1, "step": 0, "knn": 50.0} | auc) + "\n")
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "metrics.jsonl").write_text(
        json.dumps({"epoch": 0, "step": 4, "val_top1": 60.0}) + "\n"
    )
    ratios = {"moco": 3.0, "toy": 3.0, "no teacher": 0.0, "earlier": 3.0, "simsiam": 6.0}
    pulls = {f"pull_{when}": ratios[name] for when in ("first", "last") if name in ratios}
    actual = (
        {"knn": 50.0, "linear": 60.0, "step_seconds": 0.5}
        | pulls
        | {key: round(value, 4) for key, value in auc.items()}
    )
    assert units.accuracies(tmp_path) == actual
