"""Measure the step of each method over the step of MoCo v2 without a teacher, on one core.

bench.py starts it: python methods.py FOLDER PHOTOS. Networks, images and options are the bench's:
ResNet-18 from ResNet-50. MGD as published needs the time of `mgd`, because another factor and other
margins cost no time.
"""

import statistics

import setting
from job.engine.run import Run
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
    "simsiam": {"framework": "simsiam", "teacher": ""},
    "simsiam_mgd": {"framework": "simsiam"},
}


def main() -> None:
    options = setting.repeating(__doc__, repeats=5).parse_args()
    setting.pin()
    with Run(str(options.folder / "methods"), 1) as run:
        trainings = {
            name: Steps(options, run, setting.BATCH // 2, **more) for name, more in METHODS.items()
        }
        steps = {name: training.seconds for name, training in trainings.items()}
        times = setting.interleaved(steps, options.repeats)
    figures = {f"method_{ALONE}_s": statistics.median(times[ALONE])}
    for name in [name for name in METHODS if name != ALONE]:
        figures[f"method_{name}_over_{ALONE}"] = setting.ratio(times[name], times[ALONE])
    setting.write_figures(options.folder, "methods", **figures)


if __name__ == "__main__":
    main()
