"""Hints and warnings of a training that leaves its normal course."""

import math
from types import SimpleNamespace

import pytest

from job.cluster import comm
from job.config import Config
from job.frameworks.moco import LEARNT, SOLVED, STUCK, MoCoFramework
from job.hints import PULL, STEPS, WAIT, WEAK, Expectation

GUESS = math.log(257)


def steps(number=STEPS, first=0, **more):
    """Return records of `number` healthy steps, with the same numbers except those in `more`."""
    usual = {
        "epoch": 0,
        "contrastive": 0.7 * GUESS,
        "distillation": 0.1,
        "accuracy": 20.0,
        "data_wait": 0.1,
    }
    return [usual | {"steps": first + step + 1} | more for step in range(number)]


@pytest.fixture
def expectation(monkeypatch):
    """A function that returns the Expectation of MoCo, without its networks."""

    def make(images=1024, workers=2, **options):
        monkeypatch.setattr(comm, "size", lambda: workers)
        framework = object.__new__(MoCoFramework)
        framework.config = Config(moco_k=256, **options)
        framework.reference, framework.reference_text = GUESS, "ln(K + 1)"
        return Expectation(framework.config, framework, images)

    return make


@pytest.mark.parametrize(
    ("id", "name", "bound", "options"),
    [
        ("stuck", "contrastive", STUCK * GUESS, {"epoch": 3, "first": LEARNT}),
        ("solved", "accuracy", SOLVED, {"contrastive": 0.1, "distillation": 0.0}),
        ("pull", "distillation", PULL * 0.7 * GUESS, {}),
        ("wait", "data_wait", WAIT, {}),
    ],
)
def test_hint_is_given_once_beyond_bound(expectation, id, name, bound, options):
    some = expectation()
    assert some.hints(steps(**options | {name: 0.99 * bound})) == {}
    assert list(some.hints(steps(**options | {name: 1.01 * bound}))) == [id]
    assert some.hints(steps(**options | {name: 1.01 * bound})) == {}


@pytest.mark.parametrize(
    ("options", "scaled", "equal"),
    [
        (
            {"loss_share": 0.0, "loss_factor": 7.0},
            "--loss-factor 7 divides it",
            ["--loss-factor 2.8e+02 ", "now 7)"],
        ),
        (
            {"loss_factor": 7.0, "loss_share": 0.5},
            f"begins near {0.5 * GUESS:.2g}, --loss-share 0.5 of ln(K + 1)",
            ["--loss-share 0.013 ", "now 0.5)"],
        ),
    ],
)
def test_hint_of_strong_distillation_names_options(expectation, options, scaled, equal):
    some = expectation(teacher="t", **options)
    [line] = [line for line in some.lines() if line.startswith("expected: distillation loss")]
    assert scaled in line
    hint = some.hints(steps(contrastive=1.0, distillation=40.0))["pull"]
    assert all(part in hint for part in ["40 times", *equal])


DISTILLERS = [SimpleNamespace(name=name) for name in ("mgd", "gram")]


@pytest.mark.parametrize("number", [1, 2])
def test_first_hints_at_weak_loss(expectation, number):
    """One hint names all distillers with a weak loss."""
    some = expectation(teacher="t", loss_share=0.0, loss_factor=1e4)
    some.distillers = DISTILLERS[-number:]
    bound = WEAK * GUESS
    [record] = steps(1, distillation=1.01 * bound, gram=1.01 * bound, mgd=1.01 * bound)
    assert some.first(record) == {}
    low = {"gram" if number == 2 else "distillation": 0.99 * bound}
    [(id, hint)] = some.first(record | low).items()
    assert id == "weak" and "--loss-share 10" in hint and "--loss-factor 10000" in hint
    assert f"gram {0.99 * bound:.2g}" in hint and "mgd" not in hint
    assert some.first(dict.fromkeys(record, 0.0)) == {}  # of weight 0


def test_first_ignores_weak_loss(expectation):
    """It ignores the loss with --loss-share, without distillers, or without a framework's loss."""
    [record] = steps(1, distillation=0.0001)
    some = expectation(teacher="t", loss_share=0.001)
    some.distillers = DISTILLERS[:1]
    assert some.first(record) == {}
    some = expectation(teacher="t", loss_share=0.0)
    assert some.first(record) == {}  # no distillers
    some.distillers = DISTILLERS[:1]
    some.framework.losses = ()
    assert some.first(record) == {}


@pytest.mark.parametrize(
    "early", [{"epoch": 0, "first": LEARNT}, {"epoch": 2, "first": LEARNT}, {"epoch": 3}]
)
def test_hints_ignore_early_steps(expectation, early):
    assert expectation(warmup_epochs=3).hints(steps(contrastive=GUESS, **early)) == {}


def test_hints_ignore_identical_keys(expectation):
    """Then the positive is as near as all negatives, and mostly counts as the nearest."""
    assert expectation().hints(steps(accuracy=100.0, contrastive=GUESS)) == {}


@pytest.mark.parametrize(
    ("workers", "accumulate", "cause"),
    [(1, 1, "--accumulate 2"), (2, 1, "--crop-min"), (1, 2, "--crop-min")],
)
def test_solved_hint_names_batch_norm_of_one_worker(expectation, workers, accumulate, cause):
    some = expectation(workers=workers, accumulate=accumulate)
    hints = some.hints(steps(accuracy=100.0, contrastive=0.01, distillation=0.0))
    assert list(hints) == ["solved"] and cause in hints["solved"]


def test_hints_cover_short_epochs_with_next(expectation):
    """A resume shortly before an epoch's end makes it short."""
    some = expectation()
    assert some.hints(steps(STEPS - 5, data_wait=1.0)) == {}
    assert list(some.hints(steps(STEPS, data_wait=0.3))) == ["wait"]


@pytest.mark.parametrize(
    ("images", "ids"), [(1024, []), (1023, ["long_queue"]), (3, ["long_queue"])]
)
def test_warnings_of_long_queue(expectation, images, ids):
    assert list(expectation(images).warnings()) == ids


def test_warnings_include_distillers(expectation):
    some = expectation(1000)
    misfits = [lambda images: {"one": f"of {images}"}, lambda _: {}]
    some.distillers = [SimpleNamespace(misfits=each) for each in misfits]
    warnings = some.warnings()
    assert list(warnings) == ["long_queue", "one"] and warnings["one"] == "of 1000"
