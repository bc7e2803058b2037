"""The results that a study writes when it ends or stops, without training."""

import json
from types import SimpleNamespace

import pytest
import yaml

from job.study import data, study
from job.study.plan import read_plan
from job.study.units import Bench, Stopped
from runs import write_images
from tests.unit.study.test_plan import TINY

FORM = TINY | {"sets": {"mnist": {}}, "controls": ["random"], "at_once": 1}
FORM |= {"arms": {"gram": {"distill": "gram"}, "disco": {"distill": "disco"}}}
KNN = {"teacher": 50.0, "untrained": 30.0, "alone": 36.0, "mgd": 44.0, "random": 36.2}


@pytest.fixture
def started(tmp_path, monkeypatch, capsys):
    """A function that runs a study without training. A signal stops some units."""
    write_images(tmp_path / "out" / "data" / "mnist-700")
    monkeypatch.setattr(data, "digest", lambda folder: "aaaa")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FORM, sort_keys=False))
    plan = read_plan(str(tmp_path / "tiny.yaml"))

    def start(*stopped):
        def measure(bench, unit):
            if unit.name in stopped:
                bench.stop()
                raise Stopped
            record = {"unit": unit.name, "set": unit.set, "arm": unit.arm, "seed": unit.seed}
            record |= {
                "identity": bench.identity(unit),
                "commands": [],
                "seconds": 1.0,
                "on": "here",
            }
            record |= {"measured": "2030-01-01", "knn": KNN.get(unit.arm, 47.0), "linear": 20.0}
            bench.folder(unit).mkdir(parents=True, exist_ok=True)
            (bench.folder(unit) / "record.json").write_text(json.dumps(record))
            return record

        monkeypatch.setattr(Bench, "measure", measure)
        study.study(plan, tmp_path / "out")
        return SimpleNamespace(log=capsys.readouterr().out, results=tmp_path / "out" / "results")

    return start


def test_signal_leaves_results_of_complete_arms(started):
    first = started("mnist/disco-7")
    assert "stopped by a signal" in first.log
    assert "results of 11 of 13 networks are in" in first.log
    assert "mnist: k-NN: gram leads the arms shown (47.0" in first.log
    text = (first.results / "README.md").read_text()
    missing = "2 of 13 networks are not shown (an arm is shown if all its seeds are measured)"
    assert f"**Incomplete**: {missing}: on mnist disco." in text
    assert "| gram | 47.0" in text and "| disco |" not in text
    assert (first.results / "mnist.png").exists() and len(list(first.results.glob("mnist/*"))) == 11
    last = started()
    assert "done: the results are in" in last.log
    text = (last.results / "README.md").read_text()
    assert "mnist: k-NN: disco leads (47.0" in last.log or "mnist: k-NN: gram leads (" in last.log
    assert "Incomplete" not in text and "| disco | 47.0" in text
    assert len(list(last.results.glob("mnist/*"))) == 13


def test_results_need_the_arms_of_a_verdict(started):
    stopped = started("mnist/random-7")
    assert "too few networks are measured for results" in stopped.log
    assert not stopped.results.exists()
