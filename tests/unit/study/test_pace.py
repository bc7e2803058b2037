"""A study's progress and remaining time."""

import re
import time

import pytest
import yaml

from job.study.pace import Pace
from job.study.form import TEACHER
from job.study.plan import read_plan
from job.study.units import Bench
from runs import write_images
from tests.unit.study.test_plan import TINY

FORM = TINY | {"at_once": 2, "sets": {"mnist": {}}}


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FORM))
    write_images(tmp_path / "out" / "data" / "mnist-700")
    return Bench(read_plan(str(tmp_path / "tiny.yaml")), tmp_path / "out", {"mnist": "aaaa"})


def measured(pace, units, rate):
    """Return records of units with `rate` seconds per operation."""
    return {unit: {"seconds": rate * pace.work[unit]} for unit in units}


def left(line):
    """Return the seconds of a line's "about 3 min left"."""
    amounts = re.findall(r"(\d+) (\w+)", re.search(r"; about (.*) left$", line)[1])
    seconds = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    return sum(float(number) * seconds[unit] for number, unit in amounts)


def test_time_is_unknown_at_first(bench):
    assert Pace(bench).line([], {}) == "0 % done, running nothing; time left unknown"


def test_time_left_follows_from_records(bench):
    pace, units = Pace(bench), bench.plan.units
    rate = 7200 / pace.all  # two hours in sequence, one if two run at a time
    for done in (1, 5, len(units) - 1):
        fraction = sum(pace.work[unit] for unit in units[:done]) / pace.all
        line = pace.line([units[-1]], measured(pace, units[:done], rate))
        assert line.startswith(f"{100 * fraction:.0f} % done, running {units[-1].name} 0 %; about ")
        assert left(line) == pytest.approx(3600 * (1 - fraction), abs=60)


def test_time_left_without_records_follows_from_runs(bench, monkeypatch):
    monkeypatch.setattr(Pace, "fraction", lambda self, unit: fractions.get(unit, 0.0))
    teacher = next(unit for unit in bench.plan.units if unit.arm == TEACHER)
    fractions = {teacher: 0.25}  # of an earlier start
    pace = Pace(bench)
    pace.start = time.monotonic() - 100
    assert "time left unknown" in pace.line([teacher], {})
    fractions[teacher] = 0.75
    line = pace.line([teacher], {})
    expected = 100 * (pace.all - 0.75 * pace.work[teacher]) / (0.5 * pace.work[teacher])
    assert left(line) == pytest.approx(expected, rel=0.1, abs=60)


def test_work_counts_views_of_frameworks(tmp_path, bench):
    student = {"arch": "resnet18", "framework": "simsiam"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FORM | {"student": student}))
    others = Bench(read_plan(str(tmp_path / "tiny.yaml")), tmp_path / "out", {"mnist": "aaaa"})
    moco, simsiam = (
        {unit.name: pace.work[unit] for unit in pace.bench.plan.units}
        for pace in (Pace(bench), Pace(others))
    )
    measuring = 2 / 4  # of MoCo's 4 passes: an epoch of the classifier, and its validation
    ratio = simsiam["mnist/alone-0"] / moco["mnist/alone-0"]
    assert ratio == pytest.approx((6 / 4 + measuring) / (1 + measuring))
    teachers = [work["mnist/mgd-0"] - work["mnist/alone-0"] for work in (moco, simsiam)]
    assert teachers[1] == pytest.approx(2 * teachers[0])  # both views pass through the teacher


def test_work_counts_views_of_distillers(tmp_path):
    arms = {"disco": {"distill": ["mgd", "disco"]}, "bare": {"framework": "none"}}
    arms["slow"] = {"distill": "similarity", "similarity": "compress"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FORM | {"arms": arms}))
    write_images(tmp_path / "out" / "data" / "mnist-700")
    plan = read_plan(str(tmp_path / "tiny.yaml"))
    pace = Pace(Bench(plan, tmp_path / "out", {"mnist": "aaaa"}))
    work = {unit.arm: pace.work[unit] for unit in plan.units}
    network = work["alone"] / 6  # 4 passes of MoCo, 2 that measure
    teacher = work["mgd"] - work["alone"]
    second_view = 3 * network + teacher  # forward, backward (2) and through the teacher
    assert work["disco"] == pytest.approx(work["mgd"] + second_view)
    assert work["bare"] == pytest.approx(5 * network + teacher)
    assert work["slow"] == pytest.approx(7 * network + teacher)  # with a momentum encoder


def test_work_counts_networks_and_epochs(bench):
    pace = Pace(bench)
    work = {unit.name: pace.work[unit] for unit in bench.plan.units}
    assert work["mnist/untrained-0"] == work["mnist/alone-0"]  # one epoch each
    assert work["mnist/mgd-0"] > work["mnist/alone-0"]  # the teacher's passes
    assert work["mnist/teacher-0"] > 3 * work["mnist/alone-0"]
