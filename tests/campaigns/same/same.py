"""Check that an older commit and this code end the same short runs with the same bytes.

    make same OLD=COMMIT        (python tests/campaigns/same/same.py COMMIT)

Both codes train on 50 images of noise with the same options (RUNS), in this Python. This code also
resumes a run of the older code within an epoch. This code is the working tree, including changes
that are not committed. All tensors of all checkpoints are compared, and all numbers of the course
records except times. Fields that only this code writes are not compared. Prints a line per run:
`same`, or the first difference. If a run differs or fails, the exit code is 1 and the folder with
its checkpoints stays. Needs 3 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[3]
PATIENCE = 1800  # s for a run
sys.path[:0] = [str(REPO / "tests/support"), str(REPO)]

from job.metrics import schema  # noqa: E402
from runs import CLOCK, same_bytes, tensors, write_images, write_teacher  # noqa: E402

COMMON = "--image-size 32 --batch-size 16 --workers 1 --epochs 2 --keep 9".split()
TRAIN = "-a resnet18 --moco-k 32 --mlp --moco-t 0.2 --aug-plus --cos --warmup-epochs 1".split()
TRAIN += "--knn-every 1 --save-every 2steps".split()
TEACHER = ["--teacher", "{folder}/teacher.pth.tar"]
RUNS = {  # name: workers, program, options
    "mgd": (2, "job.train", [*TRAIN, *TEACHER]),
    "moco": (4, "job.train", TRAIN),
    "none": (2, "job.train", [*TRAIN, *TEACHER, "--framework", "none"]),
    "linear": (2, "job.linear", ["--pretrained", "{folder}/old-mgd/last.pth.tar"]),
}
# A worker checks which code it imports, and then acts like `python -m PROGRAM`.
WORKER = """
import runpy, sys
import job
code, sys.argv = sys.argv[1], sys.argv[2:]
if not job.__file__.startswith(code + "/"):
    sys.exit(f"wrong code: {job.__file__}; expected {code}/job")
print(f"code: {job.__file__}", flush=True)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("old", metavar="COMMIT", help="the older commit")
    commit = parser.parse_args().old
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    folder = Path(tempfile.mkdtemp(prefix="same-")).resolve()
    differ: list[str] = []
    try:
        check_out(commit, folder / "code")
        write_images(folder / "images")
        write_teacher(folder / "teacher.pth.tar")
        print(f"code: {folder}/code/job (commit {commit}) and {REPO}/job", flush=True)
        differ += [run for run in [*RUNS, "resumed"] if not compare(run, folder)]
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")
    finally:
        if not differ:
            shutil.rmtree(folder)
    sys.exit(f"different: {', '.join(differ)}; see {folder}" if differ else 0)


def check_out(commit: str, folder: Path) -> None:
    """Write a commit's files to a new folder."""
    archive = subprocess.run(["git", "-C", REPO, "archive", commit], capture_output=True)
    if archive.returncode:
        reason = archive.stderr.decode().strip()
        print(f"COMMIT {commit}: {reason}; expected a commit of {REPO}", file=sys.stderr)
        sys.exit(2)
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)


def compare(run: str, folder: Path) -> bool:
    """Do a run with both codes. Print and return whether the results are the same."""
    if run == "none" and not (folder / "code/job/frameworks").exists():
        print("none: skipped, the older code has no --framework", flush=True)
        return True
    old, new = folder / f"old-{run}", folder / f"new-{run}"
    if run in ("linear", "resumed") and not (folder / "old-mgd/last.pth.tar").exists():
        print(f"{run}: skipped, the older code's run mgd failed", flush=True)
        return False
    if run == "resumed":
        old = folder / "old-mgd"
        copy_within_epoch(old, new)
        failure = train("mgd", REPO, new, folder, "--resume", "auto")
    else:
        failure = train(run, folder / "code", old, folder) or train(run, REPO, new, folder)
    if failure:
        print(f"{run}: {failure}", flush=True)
        return False
    difference, compared = compare_checkpoints(old, new)
    if not difference:
        difference, more = compare_records(old, new)
        compared += f", {more}"
    print(f"{run}: {difference or f'same ({compared})'}", flush=True)
    if not difference:
        shutil.rmtree(new)
        if run not in ("mgd", "resumed"):  # others need the checkpoints of that run
            shutil.rmtree(old)
    return not difference


def copy_within_epoch(old: Path, new: Path) -> None:
    """Copy a run's folder, but only its first checkpoint within an epoch."""
    checkpoints = {path.name for path in old.glob("*.pth.tar")}
    within = {name for name in checkpoints if "_" in name and "_000000." not in name}
    shutil.copytree(old, new, ignore=lambda *_: checkpoints - {min(within)})


def train(run: str, code: Path, out: Path, folder: Path, *more: str) -> str:
    """Do a run with a folder's code, not with installed code.

    Return "", or the reason of a failure.
    """
    workers, program, options = RUNS[run]
    options = [option.format(folder=folder) for option in [*COMMON, *options, *more]]
    launcher = [Path(sys.executable).with_name("horovodrun"), "-np", str(workers)]
    worker = [sys.executable, "-c", WORKER, code, program, folder / "images", "--out", out]
    command = [*map(str, [*launcher, *worker]), *options]
    path = os.environ | {"PYTHONPATH": str(code)}
    output = out.with_suffix(".txt")
    with open(output, "w") as file:
        started = subprocess.Popen(command, cwd=code, env=path, stdout=file, stderr=file)
        try:
            status = started.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            started.terminate()  # horovodrun ends its workers
            started.wait()
            return f"the code in {code} did not end within {PATIENCE} s; see {output}"
    imported = output.read_text().count(f"code: {code}/job/__init__.py")
    if status or imported != workers:
        return f"the code in {code} failed (exit status {status}, {imported} workers); see {output}"
    return ""


def compare_checkpoints(old: Path, new: Path) -> tuple[str, str]:
    """Return the first difference of two runs' checkpoints, or "", and the number compared."""
    names, others = (sorted(path.name for path in run.glob("*.pth.tar")) for run in (old, new))
    if names != others or not names:
        return f"checkpoints {names} and {others}", ""
    count = 0
    for name in names:
        contents = [torch.load(run / name, weights_only=True) for run in (old, new)]
        one, other = (dict(tensors(content)) for content in contents)
        for path in sorted(one.keys() | other.keys()):
            pair = one.get(path), other.get(path)
            if any(map(torch.is_tensor, pair)):
                count += 1
                if not all(map(torch.is_tensor, pair)) or not same_bytes(*pair):
                    return f"{name}: tensor {path} differs", ""
    return "", f"{count} tensors of {len(names)} checkpoints"


def compare_records(old: Path, new: Path) -> tuple[str, str]:
    """Return the first difference of two runs' course records, or "", and the number compared."""
    one, other = course(old), course(new)
    if len(one) != len(other) or not one:
        return f"{len(one)} and {len(other)} course records", ""
    count = 0
    for before, after in zip(one, other, strict=True):
        for field in sorted(before):
            count += 1
            if before[field] != after.get(field):
                return f"record {before}: {field} is now {after.get(field)}", ""
    return "", f"{count} fields of {len(one)} records"


def course(run: Path) -> list[dict]:
    """Return a run's course records without times. Old records get the missing kind."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    records = [{**record, "kind": schema.kind_of(record)} for record in records]
    records = [record for record in records if record["kind"] in schema.COURSE]
    return [{name: record[name] for name in record.keys() - CLOCK} for record in records]


if __name__ == "__main__":
    main()
