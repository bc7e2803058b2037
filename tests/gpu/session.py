"""Run all checks that need a GPU, in at most 10 minutes on one GPU: `make gpu`.

python tests/gpu/session.py [--device cpu] [--carried FOLDER] [--only PART ...]. The most valuable
parts run first. Each part has its own time limit. A part that fails or times out does not end the
session. Folder runs/gpu-DATE has results.jsonl, a JSON line for each result, and log.txt. The last
lines are the parts' verdicts. The exit code is 0 if all have passed, 1 if not, and 2 without a GPU.
`--device cpu` is a dry run with tiny networks.

--carried: a folder made by carry.py, for a machine that reaches no package registry. The session
then uses this interpreter's torch, and builds Horovod in a separate environment.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import carry
from parts import Part, Record, report, run_parts

REPO = carry.REPO
HERE = REPO / "tests/gpu"
BENCH = REPO / "tests/campaigns/bench/bench.py"
FOLDERS = ("", "tests/support", "tests/gpu", "tests/campaigns/bench")  # on the Python path
CHOSEN = {  # tests of a part, by pytest's -k
    "cuda": {"resume": "float32 or device"},
    "cpu": {"parity": "moco", "paths": "knn or correction or each", "resume": "float32"},
}


def session_parts(device: str, work: Path, carried: Path | None) -> list[Part]:
    """Return the parts, the most valuable first. work: folder of their files."""
    python = str(work / "venv/bin/python") if carried else sys.executable

    def tests(name: str) -> list[str]:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--basetemp", str(work / f"pytest-{name}"), str(HERE / f"test_{name}.py")]
        return command + (["-k", chosen] if (chosen := CHOSEN[device].get(name)) else [])

    build = [sys.executable, str(HERE / "build.py"), str(work / "venv")]
    build += ["--carried", str(carried)] if carried else []
    profiling = [python, str(HERE / "profiling.py"), str(work / "profile"), device]
    bench = [python, str(BENCH), "--only", "gpu"]
    study = [python, str(HERE / "first_networks.py"), str(work / "study"), device]
    study += ["--carried", str(carried)] if carried else []
    if device == "cpu":
        profiling += ["--ways", "float32"]
        bench.append("--quick")
    shared = {"environment": variables(device, python)}
    return [
        Part("build", "environment, Horovod with NCCL", build, 240, **shared),
        Part("collectives", "each collective by dtype", tests("collectives"), 75, **shared),
        Part("parity", "a step on the CPU and on the GPU", tests("parity"), 75, **shared),
        Part("paths", "each framework, distiller and option", tests("paths"), 150, **shared),
        Part("resume", "kill and resume twice, digests", tests("resume"), 150, **shared),
        Part("programs", "linear, k-NN, embed, export", tests("programs"), 75, **shared),
        Part("profile", "waits, kernels, images/s", profiling, 120, **shared),
        Part("bench", "images/s, memory, step over passes", bench, 180, **shared),
        Part("study", "the full study's first networks", study, 600, endless=True, **shared),
    ]


def variables(device: str, python: str) -> dict[str, str]:
    """Return the environment variables of all parts."""
    paths = [str(REPO / folder) for folder in FOLDERS]
    values = {"TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    values["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    return values | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def no_gpu(device: str) -> str:
    """Return why the session cannot run on this machine, or "" if it can."""
    if device == "cpu":
        return ""
    command = [sys.executable, str(HERE / "no_gpu.py")]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--carried", type=Path, help="folder with wheels, source and images")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/gpu-DATE)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts")
    parser.add_argument("--minutes", type=float, default=10.0, help="time of the session")
    options = parser.parse_args()
    if problem := no_gpu(options.device):
        print(problem, file=sys.stderr)
        return 2
    out = options.out or REPO / "runs" / time.strftime("gpu-%Y-%m-%d-%H%M%S")
    record = Record(out)
    work = Path(tempfile.mkdtemp(prefix="gpu-session-"))
    start = time.monotonic()
    try:
        parts = session_parts(options.device, work, options.carried)
        if unknown := set(options.only or ()) - {part.name for part in parts}:
            expected = ", ".join(part.name for part in parts)
            print(f"--only {min(unknown)}: no such part; expected {expected}", file=sys.stderr)
            return 2
        parts = [part for part in parts if not options.only or part.name in options.only]
        record.line(f"session on {options.device}, results in {out}")
        verdicts = run_parts(parts, record, 60 * options.minutes - (time.monotonic() - start))
        return report(parts, verdicts, record)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
