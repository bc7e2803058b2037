"""Hints of real runs: their expected values, and a hint for each problem."""

import re
import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from job.config import Config, read_config
from job.data.digits import write_digits
from job.hints import STEPS
from runs import all_records, of_kind

FACTOR = 10.0  # the loss factor of the run in which distillation outweighs the contrast
# The options of the preset for small images, on smaller views.
HEALTHY = "--config small --image-size 16 --epochs 3 --print-freq 1000 --save-every 9".split()


@pytest.fixture(scope="module")
def folders(start_job, teacher_file, tmp_path_factory):
    """The folders of four runs.

    They have the options of `--config small`, a rate of 0, a weak teacher, and a strong one with
    images that are slow to read.
    """
    folder = tmp_path_factory.mktemp("expect")
    write_digits(str(folder / "digits"))
    for number in range(2 * STEPS):
        path = folder / "large" / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((3000, 3000), Image.Resampling.NEAREST).save(path)
    strong = ["--teacher", teacher_file, "--loss-factor", FACTOR, "--epochs", 1, "--batch-size", 2]
    strong += "--refresh-epochs never --distill mgd similarity --similarity-k 40".split()
    weak = ["--teacher", teacher_file, "--loss-factor", 1e4]
    weak += "--distill gram --gram-stages 1".split()
    options = {
        "healthy": [folder / "digits", *HEALTHY],
        "still": [folder / "digits", *HEALTHY, "--lr", 0],
        "weak": [folder / "digits", *HEALTHY, *weak, "--epochs", 1],
        "strong": [folder / "large", *HEALTHY, *strong, "--moco-k", 12, "-j", 0],
    }
    jobs = {name: start_job(1, folder / name, given) for name, given in options.items()}
    outputs = {name: job.finish() for name, job in jobs.items()}
    assert all(job.process.returncode == 0 for job in jobs.values()), outputs
    return {name: job.folder for name, job in jobs.items()}


def remarks(folder):
    """Return the texts of a run's hints and warnings by id. Each must be given once."""
    records = [record for kind in ("hint", "warning") for record in of_kind(folder, kind)]
    texts = {record["id"]: record["text"] for record in records}
    assert len(texts) == len(records)
    return texts


def test_healthy_run_has_no_hint(folders):
    assert remarks(folders["healthy"]) == {}


@pytest.mark.parametrize("name", ["healthy", "weak", "strong"])
def test_options_in_the_log_are_a_command_line_of_the_run(folders, name):
    log, saved = ((folders[name] / file).read_text() for file in ("log.txt", "config.yaml"))
    [shown] = re.findall(r" options: (.*) \(with the defaults: ", log)
    config, again = Config(**yaml.safe_load(saved)), read_config(shlex.split(shown))
    of_teacher = {"loss_factor", "loss_share"} if name == "healthy" else set()
    names = yaml.safe_load(saved).keys() - of_teacher
    assert all(getattr(again, name) == getattr(config, name) for name in names)


def test_run_starts_with_its_expected_values(folders):
    lines = (folders["healthy"] / "log.txt").read_text().splitlines()
    first, second = (
        index for index, line in enumerate(lines) if line[20:].startswith("expected: ")
    )
    assert all(value in lines[first] for value in ("5.55", "256", "8 steps"))
    assert "0.39 %" in lines[second]
    assert second < next(index for index, line in enumerate(lines) if "epoch 0 mean" in line)
    log = (folders["strong"] / "log.txt").read_text()
    assert log.count(" expected: ") == 3  # one for the distillation loss


def test_hint_of_a_stuck_loss(folders):
    """Logged after the epoch in which the loss should have fallen."""
    hints = remarks(folders["still"])
    assert list(hints) == ["stuck"] and all(part in hints["stuck"] for part in ("5.55", "--lr 0 "))
    kinds = [(record["kind"], record.get("epoch")) for record in all_records(folders["still"])]
    last = max(index for index, kind in enumerate(kinds) if kind == ("step", 2))
    assert last < kinds.index(("hint", None))


def test_hint_of_a_strong_teacher_has_the_equal_factor(folders):
    steps = of_kind(folders["strong"], "step")
    ratio = sum(step["distillation"] for step in steps) / sum(step["contrastive"] for step in steps)
    equal = remarks(folders["strong"])["pull"].partition("--loss-factor ")[2].split()[0]
    assert float(equal) == pytest.approx(FACTOR * ratio, rel=0.1)


def test_hint_of_a_weak_teacher(folders):
    """Logged after the first step."""
    hint = remarks(folders["weak"])["weak"]
    step = of_kind(folders["weak"], "step")[0]
    assert f"gram {step['distillation']:.2g}, with --loss-factor 10000" in hint
    kinds = [record["kind"] for record in all_records(folders["weak"])]
    assert kinds.index("hint") == kinds.index("step") + 1


def test_hints_of_long_queues_and_slow_images(folders):
    hints = remarks(folders["strong"])
    assert all(part in hints["long_queue"] for part in ("12 keys", "40 images", "--moco-k 10"))
    queue = hints["long_similarity_queue"]
    assert all(part in queue for part in ("--similarity-k 40", "40 images", "--similarity-k 20"))
    assert "--workers (now 0 " in hints["wait"]
