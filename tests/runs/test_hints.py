"""Hints of real runs."""

import numpy as np
import pytest
from PIL import Image

from job.data.digits import write_digits
from job.hints import STEPS
from runs import all_records, of_kind

FACTOR = 10.0  # by which the distillation loss is divided where it decides alone
# The demo's options, on smaller views.
DEMO = "--config small --image-size 16 --epochs 3 --print-freq 1000 --save-every 9".split()


@pytest.fixture(scope="module")
def folders(start_job, teacher_file, tmp_path_factory):
    """The folders of four runs.

    They are as the demo's, at a rate of 0, with a weak teacher, and with a strong one on images slow
    to read.
    """
    folder = tmp_path_factory.mktemp("expect")
    write_digits(str(folder / "digits"))
    for number in range(2 * STEPS):
        path = folder / "large" / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((3000, 3000), Image.Resampling.NEAREST).save(path)
    strong = [
        "--teacher",
        teacher_file,
        "--loss-factor",
        FACTOR,
        "--epochs",
        1,
        "--batch-size",
        2,
        "--refresh-epochs",
        "never",
    ]
    strong += ["--distill", "mgd", "similarity", "--similarity-k", 40]
    weak = [
        "--teacher",
        teacher_file,
        "--distill",
        "gram",
        "--gram-stages",
        1,
        "--loss-factor",
        1e4,
    ]
    options = {
        "healthy": [folder / "digits", *DEMO],
        "still": [folder / "digits", *DEMO, "--lr", 0],
        "weak": [folder / "digits", *DEMO, *weak, "--epochs", 1],
        "strong": [folder / "large", *DEMO, *strong, "--moco-k", 12, "-j", 0],
    }
    jobs = {name: start_job(1, folder / name, given) for name, given in options.items()}
    outputs = {name: job.finish() for name, job in jobs.items()}
    assert all(job.process.returncode == 0 for job in jobs.values()), outputs
    return {name: job.folder for name, job in jobs.items()}


def remarks(folder):
    """The texts of a run's hints and warnings by id, each of which is given once."""
    found = [record for kind in ("hint", "warning") for record in of_kind(folder, kind)]
    texts = {record["id"]: record["text"] for record in found}
    assert len(texts) == len(found)
    return texts


def test_a_run_with_the_demo_s_options_has_no_hint(folders):
    assert remarks(folders["healthy"]) == {}


def test_a_run_begins_with_what_is_normal_for_it(folders):
    lines = (folders["healthy"] / "log.txt").read_text().splitlines()
    first, second = (
        place for place, line in enumerate(lines) if line[20:].startswith("expected: ")
    )
    assert (
        "5.55" in lines[first]
        and "256" in lines[first]
        and "8 steps" in lines[first]
        and "0.39 %" in lines[second]
    )
    assert second < next(place for place, line in enumerate(lines) if "epoch 0 mean" in line)
    assert (folders["strong"] / "log.txt").read_text().count(
        " expected: "
    ) == 3  # one of the distillation loss


def test_a_loss_that_stays_that_of_guessing_is_a_hint_when_it_should_have_fallen(folders):
    found = remarks(folders["still"])
    assert list(found) == ["stuck"] and all(part in found["stuck"] for part in ("5.55", "--lr 0 "))
    kinds = [(record["kind"], record.get("epoch")) for record in all_records(folders["still"])]
    last = max(place for place, kind in enumerate(kinds) if kind == ("step", 2))
    assert last < kinds.index(("hint", None))


def test_a_teacher_that_outweighs_all_is_a_hint_with_the_factor_that_makes_both_equal(folders):
    steps = of_kind(folders["strong"], "step")
    ratio = sum(step["distillation"] for step in steps) / sum(step["contrastive"] for step in steps)
    equal = remarks(folders["strong"])["pull"].partition("--loss-factor ")[2].split()[0]
    assert float(equal) == pytest.approx(FACTOR * ratio, rel=0.1)


def test_a_loss_that_a_factor_for_another_distiller_hides_is_a_hint_after_the_first_step(folders):
    found = remarks(folders["weak"])["weak"]
    step = of_kind(folders["weak"], "step")[0]
    assert f"gram {step['distillation']:.2g}, with --loss-factor 10000" in found
    kinds = [record["kind"] for record in all_records(folders["weak"])]
    assert kinds.index("hint") == kinds.index("step") + 1


def test_long_queues_and_slow_images_are_remarks(folders):
    found = remarks(folders["strong"])
    assert all(part in found["long_queue"] for part in ("12 keys", "40 images", "--moco-k 10"))
    queue = found["long_similarity_queue"]
    assert all(part in queue for part in ("40 embeddings", "40 images", "--similarity-k 20"))
    assert "--workers (now 0 " in found["wait"]
