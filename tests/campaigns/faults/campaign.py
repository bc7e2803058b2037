"""Kills and stops runs of two workers at random moments, and damages what they have saved: is anything lost?

    python tests/campaigns/faults/campaign.py [--kills 50] [--seed N]

Beside the kills there are as many damaged checkpoints as are in proportion to 50 kills, 64 cuts and 200 flipped bits.
Ends with 1 where something is lost, and names the folder in which the run, and what it printed, are kept.
"""

import argparse
import itertools
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
sys.path.insert(
    0, str(Path(__file__).parents[3])
)  # the packages that lie here, wherever others are installed
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

from damage import damages
from kills import OPTIONS, Fault, KilledRun, Lost, aims, undisturbed
from phases import PHASES
from runs import write_images, write_teacher

KILLS_OF_A_RUN = {"job.train": 6, "job.linear": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    begun, folder, generator = (
        time.monotonic(),
        Path(tempfile.mkdtemp(prefix="faults-")),
        random.Random(options.seed),
    )
    print(
        f"seed {options.seed}, in {folder}; the same aims again by --seed {options.seed}",
        flush=True,
    )
    arguments = prepare(folder)
    print("undisturbed runs to compare with", flush=True)
    whole = {
        program: undisturbed(program, arguments[program], folder / f"whole-{program}")
        for program in arguments
    }
    tried = kill_runs(options.kills, folder, arguments, whole, generator)
    cuts, flips = max(2, 64 * options.kills // 50), 4 * options.kills
    print(f"damaging a checkpoint: {flips} flipped bits, cut short in {cuts} places", flush=True)
    for what, wrong in damages(whole["job.train"], folder / "damaged", cuts, flips, generator):
        tried.append(Fault(f"checkpoint {what}", survived=not wrong))
        if wrong:
            print(f"LOST: {wrong}", flush=True)
    lost = sum(not fault.survived for fault in tried)
    print(f"\n{table(tried)}\n\nin {time.monotonic() - begun:.0f} s, seed {options.seed}")
    print(f"{len(tried)} tried, {len(tried) - lost} survived, {lost} lost")
    if lost:
        sys.exit(f"what is lost is kept in {folder}")
    shutil.rmtree(folder)


def prepare(folder: Path) -> dict[str, list]:
    """Write what the runs need; return the arguments of each program."""
    images = write_images(folder / "images")
    teacher = write_teacher(folder / "teacher.pth.tar")
    more = {
        "job.train": ["--teacher", teacher],
        "job.linear": ["--pretrained", folder / "whole-job.train" / "last.pth.tar"],
    }
    return {program: [images, *OPTIONS[program], *more[program]] for program in OPTIONS}


def kill_runs(
    number: int, folder: Path, arguments: dict, whole: dict, generator: random.Random
) -> list[Fault]:
    """Kill as many runs as it takes, until `number` kills were tried; return these."""
    next_aims = {program: aims(program, generator) for program in arguments}
    tried = []
    for place, program in enumerate(itertools.cycle(("job.train", "job.linear", "job.train"))):
        if len(tried) == number:
            return tried
        name = f"{program}-{place}"
        run = KilledRun(
            program,
            [*arguments[program], "-j", generator.choice([0, 0, 1])],
            folder / name,
            whole[program],
        )
        here = []
        try:
            here_aims = itertools.islice(
                next_aims[program], min(number - len(tried), KILLS_OF_A_RUN[program])
            )
            for fault in run.kills(here_aims, generator):
                here.append(fault)
                tried.append(fault)
                hit = f"{fault.signal} to {fault.whom} in {fault.phase}"
                print(f"kill {len(tried)} of {number}: {hit}, of {name}", flush=True)
            run.finish()
            print(f"{name}: ended as if undisturbed after {len(here)} kills", flush=True)
            shutil.rmtree(run.folder)
        except Lost as error:
            (folder / f"{name}.txt").write_text(str(error))
            print(f"LOST: {name}, kept beside {name}.txt: {error}", flush=True)
        else:
            for fault in here:
                fault.survived = True
        finally:
            run.close()


def table(tried: list[Fault]) -> str:
    """What was hit, whom, by which signal, how often, and how often it was survived."""
    counts, survived = Counter(), Counter()
    for fault in tried:
        hit = fault.phase, fault.whom, fault.signal
        counts[hit] += 1
        survived[hit] += fault.survived
    lines = [f"{'what was hit':24}{'whom':8}{'signal':9}{'tried':>7}{'survived':>10}"]
    for hit in sorted(counts, key=order):
        phase, whom, name = hit
        lines.append(f"{phase:24}{whom:8}{name:9}{counts[hit]:7}{survived[hit]:10}")
    return "\n".join(lines)


def order(hit: tuple[str, str, str]) -> tuple:
    """The place of a line in the table."""
    phase = hit[0]
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), *hit)


if __name__ == "__main__":
    main()
