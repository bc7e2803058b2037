"""Check that memory, files, threads and step time do not grow in a long run of two workers.

    make test-soak MINUTES=120        (python tests/campaigns/soak/soak.py --minutes 120)

It runs job.train by horovodrun: a ResNet-18 with another as its teacher, on the digits at 32
pixels, with a refresh, a k-NN accuracy and a checkpoint each epoch, and one loader process per
worker. Every few seconds it samples the workers' resources and their position. A table shows each
figure's growth and bound. If a figure exceeds its bound, the exit code is 1. The figures go to a
file named by date.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "bench"), str(HERE.parents[2])]

import drift  # noqa: E402
from job.cluster import comm  # noqa: E402
from job.frameworks.moco import build_moco  # noqa: E402
from report import circumstances  # noqa: E402
from sample import sample, workers  # noqa: E402

OPTIONS = "digits --config small -a resnet18 --epochs 1000000 --refresh-epochs every:1"
OPTIONS += " --mgd-images 200 --knn-every 1 --workers 1 --check-every 10 --print-freq 1000"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    report = circumstances(quick=False) | {"minutes": options.minutes, "options": OPTIONS}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        samples, records = train(Path(folder), options.minutes, options.every)
    try:
        figures = drift.figures(samples, records)
    except statistics.StatisticsError:
        given = f"--minutes {options.minutes:g}"
        sys.exit(f"{given}: too few samples to separate growth from noise; expected more minutes")
    report |= {
        "load_after": os.getloadavg()[0],
        "figures": figures,
        "series": drift.series(samples, records),
    }
    options.results.mkdir(exist_ok=True)
    path = options.results / f"{report['date']}.json"
    path.write_text(drift.as_json(report))
    for name, figure in figures.items():
        verdict = "" if figure["holds"] else "MISSED"
        print(f"{name:34} {figure['found']:>10} at most {figure['bound']:<8} {verdict}")
    print(f"figures: {path}")
    sys.exit(not all(figure["holds"] for figure in figures.values()))


def train(folder: Path, minutes: float, every: float) -> tuple[list[dict], list[dict]]:
    """Train for `minutes` and stop by a signal. Return the samples and the records of steps.

    Ends this program if the run fails.
    """
    torch.manual_seed(5)
    state = {
        f"module.{name}": value
        for name, value in build_moco(comm, "resnet18", K=64, mlp=True).state_dict().items()
    }
    torch.save({"epoch": 0, "arch": "resnet18", "state_dict": state}, folder / "teacher.pth.tar")
    horovodrun = f"{Path(sys.executable).parent}/horovodrun"
    command = [horovodrun, "-np", "2", sys.executable, "-m", "job.train", *OPTIONS.split()]
    command += ["--teacher", f"{folder}/teacher.pth.tar", "--out", f"{folder}/run"]
    metrics, output, samples = folder / "run" / "metrics.jsonl", folder / "output.txt", []
    with open(output, "w") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end and launcher.poll() is None:
            samples += sample(launcher.pid, metrics)
            time.sleep(every)
        if launcher.poll() is None:  # otherwise another signal has stopped its workers
            workers(launcher.pid)[0].send_signal(signal.SIGUSR2)
        launcher.wait(timeout=300)
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait()
    records = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    if launcher.returncode or records[-1].get("how") != "stopped":
        sys.exit(f"the run ended with {launcher.returncode}:\n{output.read_text()[-3000:]}")
    return samples, [record for record in records if record["kind"] == "step"]


if __name__ == "__main__":
    main()
