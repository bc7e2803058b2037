"""Train the first networks of the full study until a signal. The log has their accuracies.

python tests/gpu/first_networks.py FOLDER {cuda,cpu} [--carried FOLDER]. It uses only the
image sets that need no system package. On the CPU it runs the small study, as a dry run.
"""

import argparse
from pathlib import Path

import yaml

import carry
from job.study.data import MOST
from job.study.plan import read_plan
from job.study.study import study

FULL = carry.REPO / "job/study/full.yaml"


def write_form(folder: Path) -> Path:
    """Write the full study's form for the sets in carry.IMAGES and return its path."""
    sets = yaml.safe_load(FULL.read_text())["sets"]
    path = folder / "full-carried.yaml"
    path.write_text(yaml.safe_dump({"base": "full", "sets": {n: sets[n] for n in carry.IMAGES}}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--carried", type=Path)
    options = parser.parse_args()
    (options.folder / "data").mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        return study(read_plan("small"), options.folder)
    plan = read_plan(str(write_form(options.folder)))
    if options.carried:
        targets = {name: options.folder / plan.images(name) for name in plan.questions}
        assert set(plan.most.values()) == {MOST}  # the number of images that carry.py packs
        carry.unpack_images(options.carried, targets)
    study(plan, options.folder)


if __name__ == "__main__":
    main()
