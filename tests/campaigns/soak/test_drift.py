"""What the soak calls growth, and what it lets pass."""

import json
import random

import pytest

import drift

STEPS, EPOCHS = 44, 40


def run(leak=0.0, files=0, slower=0.0, noise=0.02):
    """Samples and records of an hour in which memory grows by `leak` MB, files by so many, and steps take `slower` times more.

    In every fifth sample a batch is under way, with a file of its own; later in the run with two.
    """
    numbers = random.Random(0)
    samples, records = [], []
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            share = (epoch * STEPS + step) / (EPOCHS * STEPS)
            took = (1 + slower * share) * (1 + numbers.gauss(0, noise))
            records.append({"epoch": epoch, "step": step, "images_per_s": 1 / took})
            if step % 4 == 0:
                held = {
                    "rss_mb": 800 + leak * share + numbers.gauss(0, 5),
                    "tree_mb": 1500 + numbers.gauss(0, 5),
                }
                batch = (len(samples) % 5 == 0) * (1 + (share > 0.7))
                held |= {
                    "files": 60 + int(files * share) + batch,
                    "threads": 12,
                    "processes": 3,
                    "cpu_s": sum_cpu(share, slower),
                }
                samples += [
                    {"time": 3600 * share, "epoch": epoch, "step": step, "rank": rank, **held}
                    for rank in (0, 1)
                ]
        away = {
            "rss_mb": 3000,
            "tree_mb": 9000,
            "files": 99,
            "threads": 99,
            "processes": 9,
            "cpu_s": 0.0,
        }  # a refresh
        samples += [
            {"time": 3600 * share, "epoch": epoch, "step": STEPS - 1, "rank": rank, **away}
            for rank in (0, 1)
        ]
    return samples, records


def sum_cpu(share, slower):
    """CPU seconds of all steps so far, of 1 s each in the beginning."""
    return EPOCHS * STEPS * (share + slower * share**2 / 2)


def missed(**changes):
    return {name for name, figure in drift.figures(*run(**changes)).items() if not figure["holds"]}


def test_a_run_that_stays_as_it_is_passes_with_what_it_does_between_epochs():
    assert missed() == set()


def test_growth_of_memory_and_files_is_found():
    assert missed(leak=60, files=2) == {
        f"rank {rank} {name} growth" for rank in (0, 1) for name in ("rss_mb", "files")
    }


def test_growth_that_is_allowed_passes():
    assert missed(leak=10) == set()


def test_steps_that_become_slower_are_found():
    assert missed(slower=0.2) == {"s a step, ratio"} | {
        f"rank {rank} CPU s a step, ratio" for rank in (0, 1)
    }


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_noise_is_no_drift(noise):
    assert missed(noise=noise) == set()


def test_the_report_is_json_with_one_line_for_each_figure_and_series():
    samples, records = run()
    report = {
        "date": "today",
        "figures": drift.figures(samples, records),
        "series": drift.series(samples, records),
    }
    lines = drift.as_json(report).splitlines()
    assert json.loads("\n".join(lines)) == report
    inner = [line.split(": ")[0].strip() for line in lines if line.startswith("  ")]
    assert inner == [
        json.dumps(name) for section in ("figures", "series") for name in report[section]
    ]
    assert len(lines) == len(inner) + 7  # the date, and braces
