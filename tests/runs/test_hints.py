"""Hints of real runs."""

import numpy as np
import pytest
from PIL import Image

from job.data.digits import write_digits
from job.hints import STEPS

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
