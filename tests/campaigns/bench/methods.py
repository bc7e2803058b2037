"""Measure the step of each method over its own bare passes, and over the step of MoCo v2 alone.

bench.py starts it: python methods.py FOLDER PHOTOS. It runs on one core. Networks, images and
options are the bench's: ResNet-18 from ResNet-50. MGD as published needs the time of `mgd`, because
another factor and other margins cost no time. All times are the processor's.
"""

import functools
import operator
import statistics

import setting
from job.engine.run import Run
from passes import Passes
from single_steps import Steps

ALONE = "alone"
METHODS = {
    ALONE: {"teacher": ""},
    "mgd": {},
    "mgd_correction": {"mgd_correction": True},
    "projector": {"distill": ["projector"]},
    "gram": {"distill": ["gram"]},
    "simreg": {"distill": ["simreg"]},
    "similarity": {"distill": ["similarity"]},
    "disco": {"distill": ["disco"]},
    "mgd_gram": {"distill": ["mgd", "gram"]},
    "gram_without_contrast": {"framework": "none", "distill": ["gram"]},
    "simreg_without_contrast": {"framework": "none", "distill": ["simreg"]},
    "simsiam": {"framework": "simsiam", "teacher": ""},
    "simsiam_mgd": {"framework": "simsiam"},
}


def measure(names: list[str], trainings: dict[str, Steps], repeats: int) -> dict[str, float]:
    """Return the figures of methods, whose steps and passes are done in turn."""
    tasks = {}
    for name in names:
        passes = Passes(trainings[name].training)
        tasks[name] = trainings[name].cpu_seconds
        tasks[f"{name} passes"] = functools.partial(setting.cpu_seconds, passes)
    times = setting.interleaved(tasks, repeats, clock=operator.call)
    figures = {f"method_{ALONE}_s": statistics.median(times[ALONE])}
    for name in names:
        passes = times[f"{name} passes"]
        figures[f"method_{name}_over_passes"] = setting.ratio(times[name], passes)
        if name != ALONE:
            figures[f"method_{name}_over_{ALONE}"] = setting.ratio(times[name], times[ALONE])
    return figures


def main() -> None:
    parser = setting.repeating(__doc__, repeats=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    names = list(dict.fromkeys([ALONE, *options.methods]))
    setting.pin()
    with Run(str(options.folder / "methods"), 1) as run:
        trainings = {
            name: Steps(options, run, setting.BATCH // 2, **METHODS[name]) for name in names
        }
        figures = measure(names, trainings, options.repeats)
    setting.write_figures(options.folder, "methods", **figures)


if __name__ == "__main__":
    main()
