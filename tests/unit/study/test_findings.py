"""Valid comparisons, and which arm beats which."""

import pytest

from job.study.findings import AUC, Scores

CLEAR = {
    "untrained": [30.0, 31.0, 29.0],
    "alone": [40.0, 41.0, 39.0],
    "teacher": [50.0],
    "mgd": [44.0, 45.0, 43.0],
    "random": [40.5, 41.0, 39.5],
}


INVALID = "k-NN: no comparison is valid here, because a condition fails"


def scores(measure="knn", among=(), **changed):
    records = [
        {"arm": arm, "seed": seed, "knn": value, "linear": 0.0, AUC: value / 100}
        for arm, values in (CLEAR | changed).items()
        for seed, value in enumerate(values)
    ]
    return Scores.of(measure, reversed(records), among)


def test_scores_are_in_order_of_seeds():
    clear = scores()
    assert clear.by_arm["alone"] == [40.0, 41.0, 39.0] and clear.measure == "k-NN"
    assert clear.mean("alone") == 40.0 and clear.spread("alone") == 1.0
    assert clear.lead("mgd", "alone") == 4.0
    assert clear.spread("teacher") == 0.0  # it has one seed


def test_claim_is_shown_if_all_parts_hold():
    clear = scores()
    assert all(holds for _, holds in clear.conditions() + clear.claims())
    assert clear.verdict() == "k-NN: the claim is shown here"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"alone": [34.0, 35.9, 34.0]},
            "the student alone above the untrained student by +4.6 points",
        ),
        ({"teacher": [44.9]}, "the teacher above the student alone by +4.9 points"),
    ],
)
def test_comparison_is_invalid_if_a_condition_fails(changed, text):
    own = scores(**changed)
    [failed] = [condition for condition, holds in own.conditions() if not holds]
    assert text in failed
    assert own.verdict() == INVALID


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"mgd": [41.0, 42.0, 40.0]},  # a lead of exactly the spread
            "MGD does not beat the student alone: +1.0 points, spread over seeds 1.0",
        ),
        ({"mgd": [44.0, 49.0, 36.0]}, "MGD does not beat the student alone"),
        (
            {"random": [44.0, 45.0, 43.0]},
            "MGD with a random matching beats the student alone: +4.0 points",
        ),
        ({"random": [43.5, 44.5, 42.5]}, "MGD does not beat MGD with a random matching"),
    ],
)
def test_claim_is_not_shown_if_a_part_fails(changed, text):
    own = scores(**changed)
    assert any(text in claim for claim, holds in own.claims() if not holds)
    assert own.verdict() == "k-NN: the claim is not shown here"


@pytest.mark.parametrize(
    ("changed", "verb"),
    [
        ({}, "is above"),
        ({"mgd": [40.5, 41.0, 40.0]}, "is level with"),
        ({"mgd": [35.0, 36.0, 34.0]}, "is below"),
    ],
)
def test_change_exceeds_the_spread(changed, verb):
    text = scores(AUC, **changed).change("mgd", "alone")
    mean = sum((CLEAR | changed)["mgd"]) / 300
    means = f"{mean:.3f} against 0.400, spread over seeds 0.010"
    assert text == f"AUC of MGD {verb} that of the student alone: {means}"


def test_shown_has_the_spread_of_several_seeds():
    auc = scores(AUC)
    assert auc.shown("alone", 3) == "0.400 ± 0.010" and auc.shown("teacher", 3) == "0.500"


ARMS = {"gram": [46.0, 47.0, 45.0], "simreg": [45.8, 46.8, 45.2], "disco": [44.5, 45.5, 43.5]}


def test_recovered_is_a_percentage_of_the_lead():
    own = scores(**ARMS)
    assert own.recovered("gram") == pytest.approx(60.0)
    assert own.recovered("untrained") == pytest.approx(-100.0)
    assert scores(teacher=[45.0]).recovered("mgd") == pytest.approx(80.0)
    assert all(scores(teacher=[teacher]).recovered("mgd") is None for teacher in (44.9, 40.0, 38.0))


def test_ranking_has_the_leader_and_arms_that_beat_mgd():
    own = scores(among=[*ARMS], **ARMS)
    assert own.students == ["gram", "simreg", "disco", "mgd", "random", "alone"]
    leader, better = own.ranking()
    beaten = "disco, mgd, random, alone, but not simreg"
    assert leader == f"k-NN: gram leads (46.0 ± 1.0) and beats {beaten}"
    arms = "gram (by +2.0, spread 1.0), simreg (by +1.9, spread 1.0)"
    assert better == f"k-NN: mgd is beaten by {arms}"
    level = scores(among=["disco"], disco=ARMS["disco"])  # +0.5, spread 1.0
    assert level.ranking()[1] == "k-NN: mgd is beaten by no arm"
    apart = scores(among=["gram"], mgd=[40.0, 41.0, 39.0], gram=[49.0, 49.5, 48.5])
    assert apart.ranking()[0] == "k-NN: gram leads (49.0 ± 0.5) and beats random, mgd, alone"


def test_ranking_has_arms_that_beat_mgd_as_published():
    strong = scores(among=[*ARMS], original=[45.4, 45.4, 45.4], **ARMS)
    assert strong.ranking()[2] == "k-NN: original is beaten by no arm"
    weak = scores(among=[*ARMS], original=[41.9, 42.0, 42.1], **ARMS)
    better = "gram (by +4.0, spread 1.0), simreg (by +3.9, spread 0.8), disco (by +2.5, spread 1.0)"
    expected = f"k-NN: original is beaten by {better}, mgd (by +2.0, spread 1.0)"
    assert weak.ranking()[2] == expected
    better = scores(among=["disco"], original=[46.0, 46.0, 46.0], disco=ARMS["disco"])
    assert better.ranking()[1] == "k-NN: mgd is beaten by original (by +2.0, spread 1.0)"


def test_ranking_is_marked_if_a_condition_fails():
    ranking = scores(among=["gram"], gram=[60.0, 61.0, 59.0]).ranking()
    invalid = "k-NN (invalid: a condition fails): "
    assert all(line.startswith(invalid) for line in ranking) and len(ranking) == 2


@pytest.mark.parametrize(("best", "holds"), [(49.9, True), (50.0, False), (51.0, False)])
def test_conditions_compare_students_with_the_teacher(best, holds):
    values = {"gram": [best, best + 1, best - 1]}
    with_arms, without = scores(among=["gram"], **values), scores(**values)
    [*_, (text, result)] = with_arms.conditions()
    assert (result, "no student reaches the teacher" in text) == (holds, holds)
    assert f"gram has {best:.1f}, the teacher 50.0" in text
    assert (with_arms.verdict() == INVALID) == (not holds)
    assert len(without.conditions()) == 2 and without.valid()
