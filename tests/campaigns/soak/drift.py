"""What has grown in the course of a run, and how much of that is noise.

Samples are compared at the same phase: within the steps of an epoch, not while it is measured or saved, when loader
processes of their own come and go. The first tenth of the run is its warm-up, and does not count.
"""

import itertools
import json
import statistics

from scipy.stats import theilslopes

WARM_UP = 0.1
MARGIN = 5  # steps from either end of an epoch that are none of the phase: the loader is still starting, or the journal writing
BLOCKS = 12
GROWTH_MB, GROWTH = (
    20,
    0.01,
)  # allowed of memory: the larger of MB, and of the share of what is held
DRIFT = 1.05  # allowed of the last third's step time over the first third's, unless the blocks between vary more


def figures(samples: list[dict], records: list[dict]) -> dict[str, dict]:
    """Return {name: {"found", "bound", "holds"}} of all that must not grow."""
    found = {}
    for rank in (0, 1):
        flat = in_steps(samples, rank)
        for name in ("rss_mb", "tree_mb"):
            values = [one[name] for one in flat]
            bound = max(GROWTH_MB, GROWTH * statistics.median(values))
            found[f"rank {rank} {name} growth"] = entry(
                growth([one["time"] for one in flat], values), bound
            )
        # Of files the least of a third: what is left open stays, where batches that are under way hold some of their own.
        for name, held in (("files", min), ("threads", max), ("processes", max)):
            first, last = thirds([one[name] for one in flat])
            found[f"rank {rank} {name} growth"] = entry(held(last) - held(first), 0)
        found[f"rank {rank} CPU s a step, ratio"] = ratio(cpu_seconds(flat))
    found["s a step, ratio"] = ratio(step_seconds(records))
    return found


def entry(found: float, bound: float) -> dict:
    return {"found": round(found, 3), "bound": round(bound, 3), "holds": bool(found <= bound)}


def in_steps(samples: list[dict], rank: int) -> list[dict]:
    """A worker's samples after the warm-up, within the steps of an epoch."""
    last = max(one["step"] for one in samples if one["step"] is not None)
    begun, ended = samples[0]["time"], samples[-1]["time"]
    return [
        one
        for one in samples
        if one["rank"] == rank
        and one["time"] >= begun + WARM_UP * (ended - begun)
        and one["step"] is not None
        and MARGIN <= one["step"] <= last - MARGIN
    ]


def growth(times: list[float], values: list[float]) -> float:
    """How much values have grown from the first time to the last: the median of all pairs' slopes (Theil and Sen)."""
    return theilslopes(values, times).slope * (times[-1] - times[0])


def thirds(values: list) -> tuple[list, list]:
    """The first third and the last."""
    third = max(1, len(values) // 3)
    return values[:third], values[-third:]


def step_seconds(records: list[dict]) -> list[float]:
    """How long each step took after the warm-up, up to the number of images in it."""
    took = [1 / record["images_per_s"] for record in records if "images_per_s" in record]
    return took[int(WARM_UP * len(took)) :]


def cpu_seconds(flat: list[dict]) -> list[float]:
    """A worker's CPU time a step, between two samples of an epoch: what others compute on the same cores does not count."""
    pairs = [
        (a, b)
        for a, b in itertools.pairwise(flat)
        if a["epoch"] == b["epoch"] and b["step"] > a["step"] + 2
    ]
    return [(b["cpu_s"] - a["cpu_s"]) / (b["step"] - a["step"]) for a, b in pairs]


def blocks(values: list[float]) -> list[float]:
    """The medians of BLOCKS blocks, one after the other."""
    size = max(1, len(values) // BLOCKS)
    return [
        statistics.median(values[start : start + size])
        for start in range(0, size * (len(values) // size), size)
    ]


def ratio(values: list[float]) -> dict:
    """The median of the last third over that of the first; and noise, the deviation of blocks' medians from one to the next."""
    first, last = thirds(values)
    medians = blocks(values)
    between = statistics.median(abs(b - a) for a, b in itertools.pairwise(medians))
    noise = (
        1.05 * between / statistics.median(medians)
    )  # between / 0.954 is the deviation of a normal distribution
    found = entry(statistics.median(last) / statistics.median(first), max(DRIFT, 1 + 2 * noise))
    return found | {"noise": round(noise, 4)}


def series(samples: list[dict], records: list[dict]) -> dict[str, list[float]]:
    """Medians of blocks of the whole run after its warm-up, to be looked at."""
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
    """A report with one line a figure and one a series."""
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
