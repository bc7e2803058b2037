"""When a comparison means something, and what beats what."""

import pytest

from job.study.findings import AUC, Scores

CLEAR = {
    "untrained": [30.0, 31.0, 29.0],
    "alone": [40.0, 41.0, 39.0],
    "teacher": [50.0],
    "mgd": [44.0, 45.0, 43.0],
    "random": [40.5, 41.0, 39.5],
}


def scores(measure="knn", among=(), **changed):
    records = [
        {"arm": arm, "seed": seed, "knn": value, "linear": 0.0, AUC: value / 100}
        for arm, values in (CLEAR | changed).items()
        for seed, value in enumerate(values)
    ]
    return Scores.of(measure, reversed(records), among)


def test_scores_are_by_seed():
    found = scores()
    assert found.by_arm["alone"] == [40.0, 41.0, 39.0] and found.measure == "k-NN"
    assert found.mean("alone") == 40.0 and found.spread("alone") == 1.0
    assert found.lead("mgd", "alone") == 4.0
    assert found.spread("teacher") == 0.0  # of one seed there is none


def test_the_claim_is_shown_where_all_its_parts_hold():
    found = scores()
    assert all(holds for _, holds in found.conditions() + found.claims())
    assert found.verdict() == "k-NN: the claim is shown here"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"alone": [34.0, 35.9, 34.0]},
            "the student alone above the untrained student by +4.6 points",
        ),
        ({"teacher": [44.9]}, "the teacher above the student alone by +4.9 points"),
    ],
)
def test_nothing_follows_where_a_condition_fails(changed, words):
    found = scores(**changed)
    [failed] = [text for text, holds in found.conditions() if not holds]
    assert words in failed
    assert (
        found.verdict() == "k-NN: no comparison means anything here, as a condition does not hold"
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"mgd": [41.0, 42.0, 40.0]},
            "MGD does not beat the student alone: +1.0 points, spread over seeds 1.0",
        ),  # no more than it
        ({"mgd": [44.0, 49.0, 36.0]}, "MGD does not beat the student alone"),
        (
            {"random": [44.0, 45.0, 43.0]},
            "MGD with a random matching beats the student alone: +4.0 points",
        ),
        ({"random": [43.5, 44.5, 42.5]}, "MGD does not beat MGD with a random matching"),
    ],
)
def test_the_claim_is_not_shown_where_a_part_fails(changed, words):
    found = scores(**changed)
    assert any(words in text for text, holds in found.claims() if not holds)
    assert found.verdict() == "k-NN: the claim is not shown here"


@pytest.mark.parametrize(
    ("changed", "verb"),
    [
        ({}, "is above"),
        ({"mgd": [40.5, 41.0, 40.0]}, "is level with"),
        ({"mgd": [35.0, 36.0, 34.0]}, "is below"),
    ],
)
def test_an_auc_differs_if_the_difference_exceeds_the_spread(changed, verb):
    text = scores(AUC, **changed).change("mgd", "alone")
    mean = sum((CLEAR | changed)["mgd"]) / 300
    assert text == (
        f"AUC of MGD {verb} that of the student alone: {mean:.3f} against 0.400, spread over seeds 0.010"
    )


def test_a_mean_is_shown_with_its_spread_if_there_are_several_seeds():
    found = scores(AUC)
    assert found.shown("alone", 3) == "0.400 ± 0.010" and found.shown("teacher", 3) == "0.500"


ARMS = {"gram": [46.0, 47.0, 45.0], "simreg": [45.8, 46.8, 45.2], "disco": [44.5, 45.5, 43.5]}


def test_what_a_student_recovers_is_its_part_of_the_teacher_s_lead():
    found = scores(**ARMS)
    assert found.recovered("gram") == pytest.approx(60.0) and found.recovered(
        "untrained"
    ) == pytest.approx(-100.0)
    assert scores(teacher=[45.0]).recovered("mgd") == pytest.approx(80.0)
    assert all(scores(teacher=[teacher]).recovered("mgd") is None for teacher in (44.9, 40.0, 38.0))


def test_the_ranking_says_what_the_leader_beats_and_what_beats_mgd():
    found = scores(among=[*ARMS], **ARMS)
    assert found.students == ["gram", "simreg", "disco", "mgd", "random", "alone"]
    leader, better = found.ranking()
    assert (
        leader
        == "k-NN: gram leads (46.0 ± 1.0) and beats disco, mgd, random, alone, but not simreg"
    )
    arms = "gram (by +2.0, spread 1.0), simreg (by +1.9, spread 1.0)"
    assert better == f"k-NN: mgd is beaten by {arms}"
    level = scores(among=["disco"], disco=ARMS["disco"])  # +0.5, spread 1.0
    assert level.ranking()[1] == "k-NN: mgd is beaten by no arm"
    apart = scores(among=["gram"], mgd=[40.0, 41.0, 39.0], gram=[49.0, 49.5, 48.5])
    assert apart.ranking()[0] == "k-NN: gram leads (49.0 ± 0.5) and beats random, mgd, alone"


def test_the_ranking_has_what_beats_mgd_as_published():
    found = scores(among=[*ARMS], original=[45.4, 45.4, 45.4], **ARMS)
    assert found.ranking()[2] == "k-NN: original is beaten by no arm"
    weak = scores(among=[*ARMS], original=[41.9, 42.0, 42.1], **ARMS)
    better = "gram (by +4.0, spread 1.0), simreg (by +3.9, spread 0.8), disco (by +2.5, spread 1.0)"
    expected = f"k-NN: original is beaten by {better}, mgd (by +2.0, spread 1.0)"
    assert weak.ranking()[2] == expected
    better = scores(among=["disco"], original=[46.0, 46.0, 46.0], disco=ARMS["disco"])
    assert better.ranking()[1] == "k-NN: mgd is beaten by original (by +2.0, spread 1.0)"


def test_a_ranking_without_its_conditions_says_that_it_means_nothing():
    found = scores(among=["gram"], gram=[60.0, 61.0, 59.0])
    fails = "k-NN (a condition fails, so this means nothing): "
    assert all(line.startswith(fails) for line in found.ranking()) and len(found.ranking()) == 2


@pytest.mark.parametrize(("best", "holds"), [(49.9, True), (50.0, False), (51.0, False)])
def test_no_student_may_reach_the_teacher_in_forms_with_arms(best, holds):
    values = {"gram": [best, best + 1, best - 1]}
    [*_, (text, found)] = scores(among=["gram"], **values).conditions()
    assert (found, "no student reaches the teacher" in text) == (holds, holds)
    assert f"gram has {best:.1f}, the teacher 50.0" in text
    verdict = "k-NN: no comparison means anything here, as a condition does not hold"
    assert (scores(among=["gram"], **values).verdict() == verdict) == (not holds)
    assert len(scores(**values).conditions()) == 2 and scores(**values).mean_anything()
