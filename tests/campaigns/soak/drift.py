"""Measure the growth of a run's memory, files and step times, and its noise.

Samples are compared in the same phase: within the steps of an epoch. Refreshes, k-NN and saves are
excluded, because they start and end other loader processes. The first tenth of the run is its
warm-up and is excluded too.
"""

import itertools
import json
import statistics

from scipy.stats import theilslopes

WARM_UP = 0.1
# Excluded steps at both ends of an epoch: the loader still starts, or the journal writes.
MARGIN = 5
BLOCKS = 12
# Permitted growth of memory: the larger of the MB and of the fraction of the median.
GROWTH_MB, GROWTH = 20, 0.01
# Permitted step time of the last third over the first third's, unless the blocks vary more.
DRIFT = 1.05


def figures(samples: list[dict], records: list[dict]) -> dict[str, dict]:
    """Return {name: {"found", "bound", "holds"}} of all figures that must not grow."""
    entries = {}
    for rank in (0, 1):
        flat = in_steps(samples, rank)
        for name in ("rss_mb", "tree_mb"):
            values = [one[name] for one in flat]
            bound = max(GROWTH_MB, GROWTH * statistics.median(values))
            grown = growth([one["time"] for one in flat], values)
            entries[f"rank {rank} {name} growth"] = entry(grown, bound)
        # The minimum of open files: batches in transit have some too, but only leaked files stay.
        for name, extreme in (("files", min), ("threads", max), ("processes", max)):
            first, last = thirds([one[name] for one in flat])
            entries[f"rank {rank} {name} growth"] = entry(extreme(last) - extreme(first), 0)
        entries[f"rank {rank} CPU s a step, ratio"] = ratio(cpu_seconds(flat))
    entries["s a step, ratio"] = ratio(step_seconds(records))
    return entries


def entry(value: float, bound: float) -> dict:
    return {"found": round(value, 3), "bound": round(bound, 3), "holds": bool(value <= bound)}


def in_steps(samples: list[dict], rank: int) -> list[dict]:
    """Return a worker's samples after the warm-up, within the steps of an epoch."""
    last = max(one["step"] for one in samples if one["step"] is not None)
    start, end = samples[0]["time"], samples[-1]["time"]
    return [
        one
        for one in samples
        if one["rank"] == rank
        and one["time"] >= start + WARM_UP * (end - start)
        and one["step"] is not None
        and MARGIN <= one["step"] <= last - MARGIN
    ]


def growth(times: list[float], values: list[float]) -> float:
    """Return the values' growth from the first time to the last.

    The slope is the median of all pairs' slopes (Theil and Sen).
    """
    return theilslopes(values, times).slope * (times[-1] - times[0])


def thirds(values: list) -> tuple[list, list]:
    """Return the first third and the last third."""
    third = max(1, len(values) // 3)
    return values[:third], values[-third:]


def step_seconds(records: list[dict]) -> list[float]:
    """Return the steps' seconds per image after the warm-up."""
    seconds = [1 / record["images_per_s"] for record in records if "images_per_s" in record]
    return seconds[int(WARM_UP * len(seconds)) :]


def cpu_seconds(flat: list[dict]) -> list[float]:
    """Return a worker's CPU seconds per step, between two samples of an epoch.

    Other programs on the same cores do not change them.
    """
    pairs = [
        (a, b)
        for a, b in itertools.pairwise(flat)
        if a["epoch"] == b["epoch"] and b["step"] > a["step"] + 2
    ]
    return [(b["cpu_s"] - a["cpu_s"]) / (b["step"] - a["step"]) for a, b in pairs]


def blocks(values: list[float]) -> list[float]:
    """Return the medians of BLOCKS consecutive blocks."""
    size = max(1, len(values) // BLOCKS)
    return [
        statistics.median(values[start : start + size])
        for start in range(0, size * (len(values) // size), size)
    ]


def ratio(values: list[float]) -> dict:
    """Return the median of the last third over the first third's, and the noise.

    The noise is the standard deviation of the blocks' medians over their median.
    """
    first, last = thirds(values)
    medians = blocks(values)
    between = statistics.median(abs(b - a) for a, b in itertools.pairwise(medians))
    # between / 0.954 is the standard deviation if the medians have a normal distribution.
    noise = 1.05 * between / statistics.median(medians)
    drift = statistics.median(last) / statistics.median(first)
    return entry(drift, max(DRIFT, 1 + 2 * noise)) | {"noise": round(noise, 4)}


def series(samples: list[dict], records: list[dict]) -> dict[str, list[float]]:
    """Return medians of blocks of the run after its warm-up, for inspection."""
    shown = {
        "s a step (over the first block)": [
            one / blocks(step_seconds(records))[0] for one in blocks(step_seconds(records))
        ]
    }
    for rank in (0, 1):
        flat = in_steps(samples, rank)
        for name in ("rss_mb", "tree_mb", "files", "threads", "processes"):
            shown[f"rank {rank} {name}"] = blocks([one[name] for one in flat])
        shown[f"rank {rank} CPU s a step"] = blocks(cpu_seconds(flat))
    shown["epochs"] = [records[-1]["epoch"]]
    return {name: [round(value, 4) for value in values] for name, values in shown.items()}


def as_json(report: dict) -> str:
    """Return a report as JSON, with one line for each figure and series."""
    parts = []
    for name, value in report.items():
        if isinstance(value, dict):
            inner = ",\n".join(
                f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()
            )
            parts.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
