"""Kill and stop runs of two workers at random moments, and damage their checkpoints.

    python tests/campaigns/faults/campaign.py [--kills 50] [--seed N]

It also damages checkpoints: with 50 kills, by 64 cuts and 200 flipped bits, and in proportion with
other numbers. If anything is lost, the exit code is 1, and the last line names the folder with the
lost run and its output.
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
# This clone's packages have precedence over installed ones.
sys.path.insert(0, str(Path(__file__).parents[3]))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

from damage import damages
from kills import OPTIONS, Fault, KilledRun, Lost, aims, run_undisturbed
from phases import PHASES
from runs import write_images, write_teacher

KILLS_PER_RUN = {"job.train": 6, "job.linear": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    start, generator = time.monotonic(), random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"folder {folder}; --seed {options.seed} repeats the same aims", flush=True)
    arguments = prepare(folder)
    print("undisturbed runs for comparison", flush=True)
    references = {
        program: run_undisturbed(program, arguments[program], folder / f"reference-{program}")
        for program in arguments
    }
    tried = kill_runs(options.kills, folder, arguments, references, generator)
    cuts, flips = max(2, 64 * options.kills // 50), 4 * options.kills
    print(f"damaging a checkpoint: {flips} flipped bits, {cuts} cuts", flush=True)
    reference = references["job.train"]
    for damage, error in damages(reference, folder / "damaged", cuts, flips, generator):
        tried.append(Fault(f"checkpoint {damage}", survived=not error))
        if error:
            print(f"LOST: {error}", flush=True)
    lost = sum(not fault.survived for fault in tried)
    print(f"\n{table(tried)}\n\nin {time.monotonic() - start:.0f} s, seed {options.seed}")
    print(f"{len(tried)} tried, {len(tried) - lost} survived, {lost} lost")
    if lost:
        sys.exit(f"the lost runs are kept in {folder}")
    shutil.rmtree(folder)


def prepare(folder: Path) -> dict[str, list]:
    """Write images and a teacher. Return the arguments of each program."""
    images = write_images(folder / "images")
    teacher = write_teacher(folder / "teacher.pth.tar")
    more = {
        "job.train": ["--teacher", teacher],
        "job.linear": ["--pretrained", folder / "reference-job.train" / "last.pth.tar"],
    }
    return {program: [images, *OPTIONS[program], *more[program]] for program in OPTIONS}


def kill_runs(
    number: int, folder: Path, arguments: dict, references: dict, generator: random.Random
) -> list[Fault]:
    """Kill runs until `number` kills were tried. Return the kills."""
    next_aims = {program: aims(program, generator) for program in arguments}
    few = -(-number * 2 // 3)  # so that few kills hit both programs
    kills_of_run = {program: min(few, most) for program, most in KILLS_PER_RUN.items()}
    tried = []
    for index, program in enumerate(itertools.cycle(("job.train", "job.linear", "job.train"))):
        if len(tried) == number:
            return tried
        name = f"{program}-{index}"
        options = [*arguments[program], "-j", generator.choice([0, 0, 1])]
        run = KilledRun(program, options, folder / name, references[program])
        of_run = []
        try:
            count = min(number - len(tried), kills_of_run[program])
            for fault in run.kills(itertools.islice(next_aims[program], count), generator):
                of_run.append(fault)
                tried.append(fault)
                hit = f"{fault.signal} to {fault.target} in {fault.phase}"
                print(f"kill {len(tried)} of {number}: {hit}, of {name}", flush=True)
            run.finish()
            print(f"{name}: ended as if undisturbed after {len(of_run)} kills", flush=True)
            shutil.rmtree(run.folder)
        except Lost as error:
            (folder / f"{name}.txt").write_text(str(error))
            print(f"LOST: {name}, kept with {name}.txt: {error}", flush=True)
        else:
            for fault in of_run:
                fault.survived = True
        finally:
            run.close()


def table(tried: list[Fault]) -> str:
    """Return a table of phases, targets and signals, with how often each was tried and survived."""
    counts, survived = Counter(), Counter()
    for fault in tried:
        hit = fault.phase, fault.target, fault.signal
        counts[hit] += 1
        survived[hit] += fault.survived
    lines = [f"{'phase':24}{'target':8}{'signal':9}{'tried':>7}{'survived':>10}"]
    for hit in sorted(counts, key=order):
        phase, target, name = hit
        lines.append(f"{phase:24}{target:8}{name:9}{counts[hit]:7}{survived[hit]:10}")
    return "\n".join(lines)


def order(hit: tuple[str, str, str]) -> tuple:
    """Return the sort key of a row: phases in their order, then the damages."""
    phase = hit[0]
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), *hit)


if __name__ == "__main__":
    main()
