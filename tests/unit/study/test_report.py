"""The study's report and its pictures."""

import dataclasses
import struct

import pytest
import yaml

from job.study import pictures, report
from job.study.findings import AUC, MEASURES, STEP
from job.study.plan import read_plan
from tests.unit.study.test_plan import TINY

KNN = {
    "teacher": 50.0,
    "untrained": 30.0,
    "alone": 40.0,
    "mgd": 44.0,
    "random": 40.2,
    "original": 41.0,
}


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


def test_report_has_verdicts_tables_and_commands(plan, records):
    text = report.write(plan, records, {"mnist": "mnist.png"})
    hours = f"{len(records) / 4:.1f} hours of commands, 2 at a time"
    finished = "finished 2030-01-02 on another; on one machine."
    assert f"{len(records)} networks, seeds 0, 7; {hours}; {finished}" in text
    assert "**k-NN: the claim is shown here.**" in text
    assert "**linear: no comparison is valid here, because a condition fails.**" in text
    assert "condition FAILS: the teacher above the student alone by +0.0 points" in text
    assert "| mgd | 44.2 ± 0.4 | 20.0 ± 0.0 | +4.0 | +0.0 | 41 |  | 0.1 to 0.05 |" in text
    assert "| untrained | 30.2 ± 0.4 | 20.0 ± 0.0 | -10.0 | +0.0 | -103 |  |  |" in text
    assert "| teacher | 50.0 | 20.0 | +9.8 | +0.0 |  |  |  |" in text
    assert "| alone | 40.2 ± 0.4 | 20.0 ± 0.0 |  |  |  |  |  |" in text
    assert " leads (" not in text and "reaches the teacher" not in text and "Incomplete" not in text
    assert "**When should the matching be solved?**" in text
    assert text.count("| log schedule | 44.2 ± 0.4 |") == 1
    assert text.count("| once | 43.2 ± 0.4 |") == 1
    assert text.count("    train mnist/mgd-0\n") == 1 and "mgd-7" not in text
    assert "![mnist: accuracies of each seed and their means](mnist.png)" in text


def test_tables_have_the_cells_of_their_heads(plan, records):
    rows = [
        line.count("|")
        for line in report.write(plan, records, {"mnist": "m.png"}).splitlines()
        if line.startswith("|")
    ]
    assert len(rows) > 12 and set(rows) == {9}


def test_auc_is_shown_if_all_records_have_it(plan, records):
    values = {"mgd": 0.6, "alone": 0.7, "teacher": 0.65}
    for record in records:
        record[AUC] = values.get(record["arm"], 0.7) + (0.01 if record["seed"] else 0.0)
    text = report.write(plan, records, {"mnist": "mnist.png"})
    cells = "44.2 ± 0.4 | 20.0 ± 0.0 | +4.0 | +0.0 | 41 |  | 0.605 ± 0.007 | 0.1 to 0.05"
    assert f"| mgd | {cells} |" in text
    assert "| teacher | 50.0 | 20.0 | +9.8 | +0.0 |  |  | 0.650 |  |" in text
    change = "AUC of MGD is below that of the student alone: 0.605 against 0.705"
    assert f"- {change}, spread over seeds 0.007" in text
    del records[-1][AUC]
    text = report.write(plan, records, {"mnist": "mnist.png"})
    assert "AUC of MGD" not in text and "| AUC |" not in text


def test_step_time_is_shown_if_all_records_have_it(plan, records):
    times = {"alone": (0.1, 0.3), "mgd": (0.2, 0.5)}
    for record in records:
        record[STEP] = times.get(record["arm"], (0.1, 0.1))[record["seed"] == 7]
    text = report.write(plan, records, {"mnist": "mnist.png"})
    assert "| +4.0 | +0.0 | 41 |  | 1.75 | 0.1 to 0.05 |" in text  # 0.7 / 0.4
    over = "divided by that of the student alone; 2 networks train at a time"
    assert f"Step time: the median over a training's steps, {over}" in text
    del records[-1][STEP]
    assert "| step time over alone |" not in report.write(plan, records, {"mnist": "mnist.png"})


def test_split_decides_the_purpose_of_figures(plan, records):
    warning = "Do not choose settings by these figures."
    test, choose = (
        report.write(dataclasses.replace(plan, split=split), records, {"mnist": "m.png"})
        for split in ("test", "choose")
    )
    assert warning in test and "are not results" not in test
    assert "**These figures choose settings and are not results**" in choose
    assert warning not in choose


def test_one_seed_has_a_warning(plan, records):
    one, several = (
        report.write(dataclasses.replace(plan, seeds=seeds), records, {"mnist": "m.png"})
        for seeds in ([0], [0, 7])
    )
    warning = "**One seed has no deviation, so here every lead counts, even a small one.**"
    assert warning in one and "One seed" not in several


def test_ranking_is_at_the_top_of_its_set(plan, records):
    own = ["random"]  # an arm of the records
    text = report.write(dataclasses.replace(plan, arms=own), records, {"mnist": "mnist.png"})
    top = text.split("## mnist\n\n")[1].split("\n\n")[0].splitlines()
    assert top[0].startswith("- k-NN: mgd leads (44.2 ± 0.4) and beats refresh ")
    assert top[1:3] == [
        "- k-NN: mgd is beaten by no arm.",
        "- k-NN: original is beaten by mgd (by +3.0, spread 0.4).",
    ]
    invalid = "- linear (invalid: a condition fails): "
    level = f"{invalid}alone leads (20.0 ± 0.0) and beats no student, but not mgd, "
    assert top[3].startswith(level)
    assert all(line.startswith(invalid) for line in top[3:])
    holds = "no student reaches the teacher (mgd has 44.2, the teacher 50.0)"
    fails = "a student reaches the teacher (alone has 20.0, the teacher 20.0)"
    assert f"condition holds: {holds}" in text and f"condition FAILS: {fails}" in text


def test_arms_of_mgd_are_named_with_options(plan, records):
    text = report.write(plan, records, {"mnist": "mnist.png"})
    line = next(line for line in text.splitlines() if line.startswith("`mgd` is MGD"))
    assert line == (
        "`mgd` is MGD, by `--loss-share 0.1`; "
        "`random` is MGD with a random matching, by `--loss-share 0.1 --matching random`; "
        "`original` is MGD as published, by `--loss-factor 10000.0 --margins init`."
    )
    without = [unit for unit in plan.units if unit.arm != "original"]
    text = report.write(dataclasses.replace(plan, units=without), records, {"mnist": "mnist.png"})
    assert "as published" not in text


def test_arms_that_win_on_all_sets_are_named(plan, records):
    gram = [record | {"arm": "gram", "knn": 46.0 + record["seed"] / 7} for record in records[5:7]]
    first = [*records, *gram]
    second = [record | {"set": "clipart"} for record in first]
    worse = [record | {"knn": 30.0} if record["arm"] == "mgd" else record for record in second]
    plan = dataclasses.replace(plan, arms=["gram"], questions={"mnist": [], "clipart": []})
    pictures = {"mnist": "m.png", "clipart": "c.png"}
    text = report.write(plan, first + second, pictures)
    assert "- k-NN: mgd is beaten on mnist, clipart by gram.\n" in text
    assert "- k-NN: original is beaten on mnist, clipart by gram, mgd.\n" in text
    invalid = "linear (invalid: a condition fails on mnist, clipart)"
    assert f"- {invalid}: original is beaten on mnist, clipart by no arm.\n" in text
    text = report.write(plan, first + worse, pictures)
    assert "- k-NN: original is beaten on mnist, clipart by gram.\n" in text
    assert "is beaten on" not in report.write(plan, first, {"mnist": "m.png"})


def test_incomplete_arms_are_left_out_and_named(plan, records):
    assert report.complete(plan, records) == records
    lost = ("mnist/original-7", "mnist/refresh-once-0")
    shown = report.complete(plan, [each for each in reversed(records) if each["unit"] not in lost])
    assert shown == [each for each in records if each["arm"] not in ("original", "refresh once")]
    text = report.write(plan, shown, {"mnist": "mnist.png"})
    reason = "an arm is shown if all its seeds are measured"
    missing = f"4 of {len(records)} networks are not shown ({reason})"
    assert f"**Incomplete**: {missing}: on mnist original, refresh once.\n" in text
    both = [*plan.units, *(dataclasses.replace(unit, set="clipart") for unit in plan.units)]
    text_of_both = report.write(dataclasses.replace(plan, units=both), shown, {"mnist": "m.png"})
    assert ": on mnist original, refresh once; on clipart all.\n" in text_of_both
    assert "| log schedule |" in text and "| once |" not in text and "| original |" not in text
    own = dataclasses.replace(plan, arms=["refresh every epoch"])
    text = report.write(own, shown, {"mnist": "mnist.png"})
    assert "no student of the arms shown, which are not all, reaches the teacher (mgd" in text
    assert "- k-NN: mgd leads the arms shown (44.2 " in text
    text = report.write(own, records, {"mnist": "mnist.png"})
    assert "the arms shown" not in text


@pytest.mark.parametrize("name", ["teacher-0", "untrained-7", "alone-7", "mgd-0", "random-7"])
def test_sets_without_a_verdict_are_left_out(plan, records, name):
    rest = [record for record in records if record["unit"] != f"mnist/{name}"]
    assert report.complete(plan, rest) == []


def test_draw_returns_a_picture(records):
    picture = pictures.draw("mnist", records, MEASURES)
    width, height = struct.unpack(">II", picture.png[16:24])
    assert picture.png.startswith(b"\x89PNG")
    assert width == picture.width and abs(height - picture.height) <= 1
