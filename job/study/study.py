"""Train the study's networks, measure them, and say what follows. It can be stopped at any point, and goes on where it was.

python -m job.study.study small --out runs/study
"""

import argparse
import concurrent.futures
import fcntl
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from job.cli import Parser
from job.cluster.exits import reported_errors
from job.declare import expand
from job.errors import RunError
from job.show.watch.panel import span
from job.study import data, pictures, report
from job.study.findings import MEASURES
from job.study.form import TEACHER
from job.study.pace import Pace
from job.study.plan import Plan, Unit, read_plan
from job.study.units import Bench, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
LOOK = 60.0  # s between lines that tell how far it is


def main(argv: list[str] | None = None) -> None:
    """Run a study by the command line's form, to its end or to a signal."""
    parser = Parser(
        prog="job.study.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "form",
        type=expand,
        help="small, longer, simsiam, distillers, distillers-trial, distillers-long: two cores, "
        "hours; full, distillers-full: a GPU; or a YAML file of your own",
    )
    parser.add_argument(
        "--out",
        type=expand,
        required=True,
        help="folder of the study: images, runs, records and results",
    )
    with reported_errors():
        options = parser.parse_args(argv)
        study(read_plan(options.form), Path(options.out))


def study(plan: Plan, out: Path) -> None:
    """Prepare the images, measure what has no record yet, and write the results. RunError: a command has failed."""
    if plan.device == "gpu" and not torch.cuda.is_available():
        raise RunError(f"{plan.form} needs a GPU, and torch sees none; `small` is for two cores")
    bench: Bench | None = None

    def stop(*_: object) -> None:
        if bench is None:
            raise Stopped  # out of the middle of the images, which are then prepared anew
        bench.stop()

    with locked(out):
        heard = [
            number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
        ]  # as nohup has SIGHUP
        before = {number: signal.signal(number, stop) for number in heard}
        try:
            for name in plan.questions:
                data.prepare(name, out / plan.images(name), plan.most[name], say, plan.split)
            bench = Bench(
                plan, out, {name: data.digest(out / plan.images(name)) for name in plan.questions}
            )
            write_results(plan, out, measure_all(bench))
        except Stopped:
            say("stopped by a signal; the same command goes on from here")
            if bench:
                found = (bench.record(unit) for unit in plan.units)
                write_results(plan, out, [record for record in found if record])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def measure_all(bench: Bench) -> list[dict[str, Any]]:
    """Return the record of every unit, having measured what had none, so many at once as the form says; teachers go first."""
    records = {unit: record for unit in bench.plan.units if (record := bench.record(unit))}
    waiting = [unit for unit in bench.plan.units if unit not in records]
    total = len(bench.plan.units)
    say(
        f"{bench.plan.about}: {total} networks, {len(records)} measured before; to watch one: mgd-watch {bench.out}/NETWORK"
    )
    pace = Pace(bench)
    running: dict[concurrent.futures.Future, Unit] = {}
    with concurrent.futures.ThreadPoolExecutor(bench.plan.at_once) as pool:
        try:
            while waiting or running:
                ready = [
                    unit
                    for unit in waiting
                    if not unit.guided or bench.teachers[unit.set] in records
                ]
                ready.sort(
                    key=lambda unit: unit.arm != TEACHER
                )  # the longest, which others wait for
                for unit in ready[: bench.plan.at_once - len(running)]:
                    waiting.remove(unit)
                    running[pool.submit(bench.measure, unit)] = unit
                done, _ = concurrent.futures.wait(running, LOOK, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    records[running[future]] = future.result()
                    tell(future.result(), len(records), total)
                    del running[future]
                say(pace.line(running.values(), records))
        except BaseException:
            bench.stop()
            raise
    return [records[unit] for unit in bench.plan.units]


def tell(record: dict[str, Any], done: int, total: int) -> None:
    """Say what a unit gave."""
    scores = ", ".join(f"{name} {record[number]:.1f} %" for number, name in MEASURES.items())
    say(f"{done} of {total}: {record['unit']}: {scores}, {span(record['seconds'])}")


def write_results(plan: Plan, out: Path, records: list[dict[str, Any]]) -> None:
    """Write the folder out/results: the report, a picture a set, a record a unit. Print verdicts.

    Only complete arms are written (report.complete); without any, nothing is written.
    """
    everything, records = len(plan.units), report.complete(plan, records)
    if not records:
        say("too few networks are measured for results")
        return
    new = out / "results.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    names = {}
    for name in dict.fromkeys(record["set"] for record in records):
        own = [record for record in records if record["set"] == name]
        names[name] = f"{name}.png"
        (new / names[name]).write_bytes(pictures.draw(name, own, MEASURES).png)
        for scores in report.scores_of(plan, name, own):
            for text, holds in scores.conditions():
                say(f"{name}: {scores.measure}: condition {'holds' if holds else 'FAILS'}: {text}")
            for text, _ in scores.claims():
                say(f"{name}: {scores.measure}: {text}")
            for text in scores.ranking() if plan.arms else []:
                say(f"{name}: {text}")
            say(f"{name}: {scores.verdict()}")
    for record in records:
        path = new / f"{record['unit']}.json"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(out / record["unit"] / "record.json", path)
    (new / "README.md").write_text(report.write(plan, records, names))
    shutil.rmtree(out / "results", ignore_errors=True)
    new.rename(out / "results")
    done = len(records) == everything
    some = f"results of {len(records)} of {everything} networks"
    say(f"{'done: the results' if done else some} are in {out / 'results'}/README.md")


class locked:
    """The study's folder, in which no other study runs. RunError: one does, or it cannot be written."""

    def __init__(self, out: Path):
        try:
            (out / "data").mkdir(parents=True, exist_ok=True)
            self.file = open(out / "lock", "w")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"--out {out}: another study runs there; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise RunError(
                f"--out {out}: {error.strerror}; choose a folder that can be written"
            ) from None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.file.close()


def say(text: str) -> None:
    """Say a line, with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
