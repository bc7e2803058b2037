"""The soak's figures: growth, drift and noise."""

import json
import random

import pytest

import drift

STEPS, EPOCHS = 44, 40


def run(leak=0.0, files=0, slower=0.0, noise=0.02):
    """Return samples and records of an hour with growing memory, files and step time.

    leak: growth in MB. files: leaked ones. slower: the fraction by which a step's time grows. In
    every fifth sample a batch in transit has a file, later in the run two.
    """
    numbers = random.Random(0)
    samples, records = [], []
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            fraction = (epoch * STEPS + step) / (EPOCHS * STEPS)
            seconds = (1 + slower * fraction) * (1 + numbers.gauss(0, noise))
            records.append({"epoch": epoch, "step": step, "images_per_s": 1 / seconds})
            if step % 4 == 0:
                values = {
                    "rss_mb": 800 + leak * fraction + numbers.gauss(0, 5),
                    "tree_mb": 1500 + numbers.gauss(0, 5),
                }
                batch = (len(samples) % 5 == 0) * (1 + (fraction > 0.7))
                values |= {
                    "files": 60 + int(files * fraction) + batch,
                    "threads": 12,
                    "processes": 3,
                    "cpu_s": sum_cpu(fraction, slower),
                }
                samples += [
                    {"time": 3600 * fraction, "epoch": epoch, "step": step, "rank": rank, **values}
                    for rank in (0, 1)
                ]
        refresh = {"rss_mb": 3000, "tree_mb": 9000}
        refresh |= {"files": 99, "threads": 99, "processes": 9, "cpu_s": 0.0}
        samples += [
            {"time": 3600 * fraction, "epoch": epoch, "step": STEPS - 1, "rank": rank, **refresh}
            for rank in (0, 1)
        ]
    return samples, records


def sum_cpu(fraction, slower):
    """Return the CPU seconds of all steps so far. The first need 1 s each."""
    return EPOCHS * STEPS * (fraction + slower * fraction**2 / 2)


def missed(**changes):
    return {name for name, figure in drift.figures(*run(**changes)).items() if not figure["holds"]}


@pytest.mark.parametrize("changes", [{}, {"leak": 10}, {"noise": 0.05}, {"noise": 0.3}])
def test_small_growth_and_noise_pass(changes):
    """Refreshes between the epochs do not count."""
    assert missed(**changes) == set()


def test_growth_of_memory_and_files_is_missed():
    assert missed(leak=60, files=2) == {
        f"rank {rank} {name} growth" for rank in (0, 1) for name in ("rss_mb", "files")
    }


def test_slower_steps_are_missed():
    assert missed(slower=0.2) == {"s a step, ratio"} | {
        f"rank {rank} CPU s a step, ratio" for rank in (0, 1)
    }


def test_report_has_a_line_for_each_figure_and_series():
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
