"""What is called normal, and hints where reality leaves it: in real runs, and at the bounds."""

import math

import numpy as np
import pytest
from PIL import Image

from job.config import Config
from job.data.digits import write_digits
from job.metrics.hints import LEARNT, PULL, SOLVED, STEPS, STUCK, WAIT, Expectation

GUESS = math.log(257)
FACTOR = 10.0  # by which the distillation loss is divided where it decides alone
# The demo's options, on smaller views.
DEMO = "--config small --image-size 16 --epochs 3 --print-freq 1000 --save-every 9".split()


@pytest.fixture(scope="module")
def said(start_job, teacher_file, tmp_path_factory):
    """The lines of the logs of three runs: as the demo's, at a rate of 0, and under a strong teacher on images slow to read."""
    folder = tmp_path_factory.mktemp("expect")
    write_digits(str(folder / "digits"))
    for number in range(2 * STEPS):
        path = folder / "large" / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((3000, 3000), Image.Resampling.NEAREST).save(path)
    strong = ["--teacher", teacher_file, "--loss-factor", FACTOR, "--epochs", 1, "--batch-size", 2, "--refresh-epochs", "never"]
    options = {
        "healthy": [folder / "digits", *DEMO],
        "still": [folder / "digits", *DEMO, "--lr", 0],
        "strong": [folder / "large", *DEMO, *strong, "--moco-k", 12, "-j", 0],
    }
    jobs = {name: start_job(1, folder / name, given) for name, given in options.items()}
    outputs = {name: job.finish() for name, job in jobs.items()}
    assert all(job.process.returncode == 0 for job in jobs.values()), outputs
    return {name: [line[20:] for line in (job.folder / "log.txt").read_text().splitlines()] for name, job in jobs.items()}


def odd(lines):
    """The hints and warnings among lines."""
    return [line for line in lines if line.startswith(("hint: ", "warning: "))]


def test_a_run_of_the_demo_s_options_has_nothing_odd(said):
    assert odd(said["healthy"]) == []


def test_a_run_begins_with_what_is_normal_for_it(said):
    first, second = (line for line in said["healthy"] if line.startswith("expected: "))
    assert "near ln(K + 1) = 5.55, that of guessing among 256 negatives" in first and "(8 steps;" in first
    assert "contrast accuracy 0.39 % by chance" in second
    assert said["healthy"].index(second) < next(place for place, line in enumerate(said["healthy"]) if "mean:" in line)
    assert sum(line.startswith("expected: distillation loss") for line in said["strong"]) == 1


def test_a_loss_that_stays_that_of_guessing_is_hinted_at_once_it_should_have_fallen(said):
    [hint] = odd(said["still"])
    assert "is that of guessing, ln(K + 1) = 5.55: see whether --lr 0 is too high" in hint
    assert said["still"].index(hint) > next(place for place, line in enumerate(said["still"]) if "epoch 2 mean" in line)


def test_a_teacher_that_decides_alone_is_hinted_at_with_the_factor_that_makes_both_equal(said):
    [hint] = [line for line in odd(said["strong"]) if "distillation" in line]
    [mean] = [line for line in said["strong"] if "epoch 0 mean" in line]
    ratio = float(mean.partition("(ratio ")[2].partition(")")[0])
    assert float(hint.partition("--loss-factor ")[2].split()[0]) == pytest.approx(FACTOR * ratio, rel=0.1)


def test_a_queue_that_is_long_for_the_images_and_images_that_come_slowly_are_told(said):
    found = odd(said["strong"])
    assert sum("12 keys, more than a quarter of the 40 images" in line and "--moco-k 10 or less" in line for line in found) == 1
    assert sum("goes into waiting for images: more --workers (now 0 a worker)" in line for line in found) == 1


def steps(number=STEPS, first=0, **more):
    """The records of so many healthy steps, all with the same numbers but for what is given."""
    usual = {"epoch": 0, "contrastive": 0.7 * GUESS, "distillation": 0.1, "accuracy": 20.0, "data_wait": 0.1}
    return [usual | {"steps": first + step + 1} | more for step in range(number)]


def expectation(images=1024, workers=2, **options):
    return Expectation(Config(moco_k=256, **options), images, workers)


@pytest.mark.parametrize(
    ("name", "bound", "options"),
    [
        ("contrastive", STUCK * GUESS, {"epoch": 3, "first": LEARNT}),
        ("accuracy", SOLVED, {"contrastive": 0.1, "distillation": 0.0}),
        ("distillation", PULL * 0.7 * GUESS, {}),
        ("data_wait", WAIT, {}),
    ],
)
def test_a_hint_is_given_beyond_its_bound_and_not_before_it_and_once(name, bound, options):
    some = expectation()
    assert some.hints(steps(**options | {name: 0.99 * bound})) == []
    assert len(some.hints(steps(**options | {name: 1.01 * bound}))) == 1
    assert some.hints(steps(**options | {name: 1.01 * bound})) == []


@pytest.mark.parametrize(
    ("options", "scaled", "equal"),
    [
        (
            {"loss_share": 0.0, "loss_factor": 7.0},
            "--loss-factor 7 divides it",
            "--loss-factor 2.8e+02 would make them equal (now 7)",
        ),
        (
            {"loss_factor": 7.0, "loss_share": 0.5},
            f"begins near {0.5 * GUESS:.2g}, --loss-share 0.5 of ln(K + 1)",
            "--loss-share 0.013 would make them equal (now 0.5)",
        ),
    ],
)
def test_the_pull_is_told_by_the_option_that_sets_it(options, scaled, equal):
    some = expectation(teacher="t", **options)
    assert sum(scaled in line for line in some.lines() if line.startswith("expected: distillation loss")) == 1
    [hint] = some.hints(steps(contrastive=1.0, distillation=40.0))
    assert equal in hint


@pytest.mark.parametrize("early", [{"epoch": 0, "first": LEARNT}, {"epoch": 2, "first": LEARNT}, {"epoch": 3}])
def test_nothing_is_learnt_in_the_first_steps_the_first_epoch_and_the_warm_up(early):
    assert expectation(warmup_epochs=3).hints(steps(contrastive=GUESS, **early)) == []


def test_keys_that_are_all_one_are_no_easy_task():
    """Then the positive is as near as all others, and mostly counts as found."""
    assert expectation().hints(steps(accuracy=100.0, contrastive=GUESS)) == []


@pytest.mark.parametrize(
    ("workers", "accumulate", "cause"), [(1, 1, "--accumulate 2"), (2, 1, "--crop-min"), (1, 2, "--crop-min")]
)
def test_one_worker_is_told_that_its_batch_norm_is_not_shuffled(workers, accumulate, cause):
    [hint] = expectation(workers=workers, accumulate=accumulate).hints(steps(accuracy=100.0, contrastive=0.01, distillation=0.0))
    assert cause in hint


def test_a_few_steps_are_judged_with_those_that_follow():
    """As after a resume just before an epoch's end."""
    some = expectation()
    assert some.hints(steps(STEPS - 5, data_wait=1.0)) == []
    assert len(some.hints(steps(STEPS, data_wait=0.3))) == 1


@pytest.mark.parametrize(("images", "warned"), [(1024, 0), (1023, 1), (3, 1)])
def test_a_queue_of_more_than_a_quarter_of_the_images_is_warned_of(images, warned):
    assert len(odd(expectation(images).lines())) == warned
