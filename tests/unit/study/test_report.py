"""The study's results in text and in pictures."""

import struct

import pytest
import yaml

from job.study import pictures, report
from job.study.findings import AUC, MEASURES
from job.study.plan import read_plan
from tests.unit.study.test_plan import TINY

KNN = {"teacher": 50.0, "untrained": 30.0, "alone": 40.0, "mgd": 44.0, "random": 40.2, "original": 41.0}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"sets": {"mnist": {"questions": ["refresh"]}}}))
    return read_plan(str(path))


@pytest.fixture
def records(plan):
    return [
        {
            "unit": unit.name,
            "set": unit.set,
            "arm": unit.arm,
            "seed": unit.seed,
            "knn": KNN.get(unit.arm, 43.0) + (0.5 if unit.seed else 0.0),
            "linear": 20.0,
            "seconds": 900.0,
            "measured": f"2030-01-0{2 if unit.arm == 'mgd' else 1}",
            "on": "one machine" if unit.seed else "another",
            "commands": [f"train {unit.name}"],
            **({"pull_first": 0.1, "pull_last": 0.05} if unit.guided else {}),
        }
        for unit in plan.units
    ]


def test_the_report_has_conditions_verdicts_tables_and_commands(plan, records):
    text = report.write(plan, records, {"mnist": "mnist.png"})
    assert f"{len(records)} networks, seeds 0, 7; {len(records) / 4:.1f} hours of commands, 2 at a time; " in text
    assert "; finished 2030-01-02 on another; on one machine." in text
    assert "**k-NN: the claim is shown here.**" in text
    assert "**linear: no comparison means anything here, as a condition does not hold.**" in text
    assert "condition FAILS: the teacher above the student alone by +0.0 points" in text
    assert "| mgd | 44.2 ± 0.4 | 20.0 ± 0.0 | +4.0 | +0.0 | 0.1 to 0.05 |" in text
    assert "| teacher | 50.0 | 20.0 | +9.8 | +0.0 |  |" in text
    assert "| alone | 40.2 ± 0.4 | 20.0 ± 0.0 |  |  |  |" in text
    assert "**When should the matching be solved?**" in text
    assert text.count("| log schedule | 44.2 ± 0.4 |") == 1 and text.count("| once | 43.2 ± 0.4 |") == 1
    assert text.count("    train mnist/mgd-0\n") == 1 and "mgd-7" not in text
    assert "![mnist: accuracies of each seed and their means](mnist.png)" in text


def test_all_tables_have_as_many_cells_as_their_heads(plan, records):
    rows = [line.count("|") for line in report.write(plan, records, {"mnist": "m.png"}).splitlines() if line.startswith("|")]
    assert len(rows) > 12 and set(rows) == {7}


def test_the_auc_is_a_column_if_all_records_have_it(plan, records):
    spread = {"mgd": 0.6, "alone": 0.7, "teacher": 0.65}
    for record in records:
        record[AUC] = spread.get(record["arm"], 0.7) + (0.01 if record["seed"] else 0.0)
    text = report.write(plan, records, {"mnist": "mnist.png"})
    assert "| mgd | 44.2 ± 0.4 | 20.0 ± 0.0 | +4.0 | +0.0 | 0.605 ± 0.007 | 0.1 to 0.05 |" in text
    assert "| teacher | 50.0 | 20.0 | +9.8 | +0.0 | 0.650 |  |" in text
    changed = "AUC of MGD is below that of the student alone: 0.605 against 0.705"
    assert f"- {changed}, spread over seeds 0.007" in text
    del records[-1][AUC]
    text = report.write(plan, records, {"mnist": "mnist.png"})
    assert "AUC of MGD" not in text and "| AUC |" not in text


def test_a_picture_is_drawn(records):
    picture = pictures.draw("mnist", records, MEASURES)
    width, height = struct.unpack(">II", picture.png[16:24])
    assert picture.png.startswith(b"\x89PNG") and width == picture.width and abs(height - picture.height) <= 1
