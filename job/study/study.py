"""Train the networks of a study, measure them, and report the results.

You can stop the study at any point. The same command resumes it:

python -m job.study.study small --out runs/study
"""

import argparse
import fcntl
import shutil
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
PROGRESS_EVERY = 60.0  # s between lines of progress


def main(argv: list[str] | None = None) -> None:
    """Run `job.study.study` on the command line's options."""
    parser = Parser(
        prog="job.study.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "form",
        type=expand,
        help="small, longer, simsiam, distillers, distillers-trial, distillers-long: two cores, "
        "hours; full, distillers-full: a GPU; or a YAML file",
    )
    parser.add_argument(
        "--out",
        type=expand,
        required=True,
        help="folder for images, runs, records and results",
    )
    with reported_errors():
        options = parser.parse_args(argv)
        study(read_plan(options.form), Path(options.out))


def study(plan: Plan, out: Path) -> None:
    """Prepare the images, measure the units without a record, and write the results.

    RunError: there is no GPU but the form needs one, or a command fails.
    """
    if plan.device == "gpu" and not torch.cuda.is_available():
        raise RunError(
            f"{plan.form}: torch finds no GPU; expected one. The form small needs two cores only"
        )
    bench: Bench | None = None

    def stop(*_: object) -> None:
        if bench is None:
            raise Stopped  # unfinished images are prepared again
        bench.stop()

    with locked(out):
        # Ignored signals stay ignored, such as SIGHUP under nohup.
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in handled}
        try:
            for name in plan.questions:
                data.prepare(name, out / plan.images(name), plan.most[name], log, plan.split)
            bench = Bench(
                plan, out, {name: data.digest(out / plan.images(name)) for name in plan.questions}
            )
            write_results(plan, out, measure_all(bench))
        except Stopped:
            log("stopped by a signal; the same command resumes the study")
            if bench:
                records = (bench.record(unit) for unit in plan.units)
                write_results(plan, out, [record for record in records if record])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def measure_all(bench: Bench) -> list[dict[str, Any]]:
    """Measure the units without a record, at_once at a time. Return the records of all units.

    Teachers are first, because they take longest and guided units need them.
    """
    records = {unit: record for unit in bench.plan.units if (record := bench.record(unit))}
    waiting = [unit for unit in bench.plan.units if unit not in records]
    total = len(bench.plan.units)
    log(f"{bench.plan.about}: {total} networks, {len(records)} measured before")
    log(f"to watch a network: mgd-watch {bench.out}/SET/NETWORK/train")
    pace = Pace(bench)
    running: dict[Future, Unit] = {}
    with ThreadPoolExecutor(bench.plan.at_once) as pool:
        try:
            while waiting or running:
                ready = [
                    unit
                    for unit in waiting
                    if not unit.guided or bench.teachers[unit.set] in records
                ]
                ready.sort(key=lambda unit: unit.arm != TEACHER)
                for unit in ready[: bench.plan.at_once - len(running)]:
                    waiting.remove(unit)
                    running[pool.submit(bench.measure, unit)] = unit
                done, _ = wait(running, PROGRESS_EVERY, FIRST_COMPLETED)
                for future in done:
                    records[running[future]] = future.result()
                    log_record(future.result(), len(records), total)
                    del running[future]
                log(pace.line(running.values(), records))
        except BaseException:
            bench.stop()
            raise
    return [records[unit] for unit in bench.plan.units]


def log_record(record: dict[str, Any], done: int, total: int) -> None:
    """Print a unit's accuracies and time."""
    scores = ", ".join(f"{name} {record[number]:.1f} %" for number, name in MEASURES.items())
    log(f"{done} of {total}: {record['unit']}: {scores}, {span(record['seconds'])}")


def write_results(plan: Plan, out: Path, records: list[dict[str, Any]]) -> None:
    """Print the verdicts, and write out/results: report, pictures of sets, records of units.

    Only complete arms are written (report.complete). If there are none, nothing is written.
    """
    total, records = len(plan.units), report.complete(plan, records)
    if not records:
        log("too few networks are measured for results")
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
                log(f"{name}: {scores.measure}: condition {'holds' if holds else 'FAILS'}: {text}")
            for text, _ in scores.claims():
                log(f"{name}: {scores.measure}: {text}")
            for text in scores.ranking() if plan.arms else []:
                log(f"{name}: {text}")
            log(f"{name}: {scores.verdict()}")
    for record in records:
        path = new / f"{record['unit']}.json"
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(out / record["unit"] / "record.json", path)
    (new / "README.md").write_text(report.write(plan, records, names))
    shutil.rmtree(out / "results", ignore_errors=True)
    new.rename(out / "results")
    done = len(records) == total
    some = f"results of {len(records)} of {total} networks"
    log(f"{'done: the results' if done else some} are in {out / 'results'}/README.md")


class locked:
    """A lock on the study's folder. RunError: another study has it, or it is not writable."""

    def __init__(self, out: Path):
        try:
            (out / "data").mkdir(parents=True, exist_ok=True)
            self.file = open(out / "lock", "w")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"--out {out}: another study runs there; expected a free folder. "
                "Wait for the study, or choose another --out"
            ) from None
        except OSError as error:
            raise RunError(
                f"--out {out}: {error.strerror}; expected a writable folder. Choose another --out"
            ) from None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.file.close()


def log(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
