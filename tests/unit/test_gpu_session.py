"""The session of `make gpu`: order, limits, results and verdicts, without a GPU."""

import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import psutil
import pytest

import build
import carry
import no_gpu
import parts
import profiling
import session
from parts import FAILED, LEFT_OUT, PASSED, TIMED_OUT, Part, Record, report, run_parts

REPO = Path(__file__).parents[2]
# A program that starts a child, prints both process ids and never ends. Both ignore SIGTERM.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", own], stdout=subprocess.PIPE)
child.stdout.read(1)
print("pids", os.getpid(), child.pid, flush=True)
signal.pause()
"""
FAILING = """
import os, sys
print("failing", file=sys.stderr)
with open(os.environ["GPU_RESULTS"], "a") as file:
    print('{"kind": "own"}', file=file)
sys.exit(3)
"""


def part(name, limit=60.0, lines=(), **more):
    return Part(name, f"about {name}", [sys.executable, "-c", *lines], limit, **more)


def runs(pid):
    """Return whether a process runs. An orphan that is not reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lines(record):
    return [json.loads(line) for line in record.results.read_text().splitlines()]


class Fakes:
    """Runs parts for given seconds of a fake clock, with given verdicts."""

    def __init__(self, seconds, verdicts):
        self.seconds, self.verdicts = seconds, verdicts
        self.now, self.ran = 0.0, []

    def clock(self):
        return self.now

    def run(self, part, limit, record):
        self.ran.append((part.name, limit))
        record.result(kind="test", part=part.name)
        needed = self.seconds[part.name]
        self.now += min(needed, limit)
        return (TIMED_OUT if needed > limit else self.verdicts[part.name]), 0


def test_parts_run_in_order_within_limits(tmp_path):
    record = Record(tmp_path / "out")
    fakes = Fakes({"a": 10, "b": 70, "c": 5, "d": 9}, dict.fromkeys("abcd", PASSED) | {"a": FAILED})
    given = [part("a"), part("b"), part("c", 100), part("d", 100)]
    verdicts = run_parts(given, record, 100.0, fakes.run, fakes.clock)
    assert fakes.ran == [("a", 60), ("b", 60), ("c", 30), ("d", 25)]
    assert verdicts == {"a": FAILED, "b": TIMED_OUT, "c": PASSED, "d": PASSED}


def test_part_without_time_is_left_out(tmp_path):
    fakes = Fakes({"a": 58, "b": 1}, dict.fromkeys("ab", PASSED))
    record = Record(tmp_path)
    verdicts = run_parts([part("a"), part("b")], record, 60.0, fakes.run, fakes.clock)
    assert verdicts == {"a": PASSED, "b": LEFT_OUT} and [name for name, _ in fakes.ran] == ["a"]


def test_results_are_written_at_once(tmp_path):
    """The file has the results of earlier parts while a later part runs."""
    record, seen = Record(tmp_path), []

    def run(part, limit, record):
        seen.append([line["kind"] for line in lines(record)] if record.results.exists() else [])
        record.result(kind="test", part=part.name)
        return PASSED, 0

    run_parts([part("a"), part("b")], record, 600.0, run)
    assert seen == [[], ["test", "verdict"]]
    assert [line["verdict"] for line in lines(record) if line["kind"] == "verdict"] == [PASSED] * 2


@pytest.mark.parametrize(
    "verdicts, code",
    [
        ([PASSED, PASSED], 0),
        ([FAILED, PASSED], 1),
        ([TIMED_OUT, PASSED], 1),
        ([LEFT_OUT, PASSED], 1),
        ([PASSED, LEFT_OUT], 0),
        ([PASSED, FAILED], 1),
    ],
)
def test_report_returns_the_exit_code(verdicts, code, tmp_path, capsys):
    """The endless part may be left out. Each verdict is printed."""
    given = [part("first"), part("last", endless=True)]
    by_name = dict(zip(["first", "last"], verdicts, strict=True))
    assert report(given, by_name, Record(tmp_path)) == code
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split("  ")[0].strip() for line in printed] == verdicts
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:] == printed


def test_part_output_and_exit_code_are_kept(tmp_path):
    record = Record(tmp_path)
    given = [part("fails", lines=[FAILING]), part("passes", lines=["print(1)"])]
    given.append(Part("missing", "", [str(tmp_path / "nothing")], 60.0))
    verdicts = run_parts(given, record, 600.0)
    assert verdicts == {"fails": FAILED, "passes": PASSED, "missing": FAILED}
    assert [line.get("code") for line in lines(record)] == [None, 3, 0, None]
    assert lines(record)[0]["kind"] == "own"
    assert "  failing" in (tmp_path / "log.txt").read_text().splitlines()


@pytest.mark.parametrize("endless, verdict", [(False, TIMED_OUT), (True, PASSED)])
def test_endless_part_is_killed_with_its_children(
    endless,
    verdict,
    tmp_path,
    monkeypatch,
):
    """The limit starts when the part has printed its process ids."""
    record, waited = Record(tmp_path), subprocess.Popen.wait

    def wait(process, timeout=None):
        while timeout and not (record.log.exists() and "pids" in record.log.read_text()):
            assert process.poll() is None
        return waited(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    monkeypatch.setattr(parts, "GRACE", 0.1)
    stubborn = part("stubborn", lines=[STUBBORN], endless=endless)
    assert parts.execute(stubborn, 0.2, record)[0] == verdict
    pids = re.search(r"pids (\d+) (\d+)", record.log.read_text()).groups()
    while any(map(runs, map(int, pids))):  # SIGKILL is not immediate
        pass


def test_session_parts_have_order_and_files(tmp_path):
    for device in ("cuda", "cpu"):
        made = session.session_parts(device, tmp_path, None)
        names = [each.name for each in made]
        assert names[:5] == ["build", "collectives", "parity", "paths", "resume"]
        assert names[5:] == ["programs", "profile", "bench", "study"]
        for each in made:
            scripts = [word for word in each.command if word.endswith(".py")]
            assert scripts and all(Path(word).is_file() for word in scripts)
            assert each.environment["TEST_DEVICE"] == device
            assert (each.environment.get("CUDA_VISIBLE_DEVICES") == "") == (device == "cpu")


def test_session_uses_the_carried_environment(tmp_path):
    build, *others = session.session_parts("cuda", tmp_path, tmp_path / "carried")
    assert build.command[0] == sys.executable
    assert {each.command[0] for each in others} == {str(tmp_path / "venv/bin/python")}


def test_session_fits_the_first_parts():
    """Their limits add up to less than ten minutes."""
    limits = {each.name: each.limit for each in session.session_parts("cuda", Path("/tmp"), None)}
    assert sum(limits[name] for name in ("build", "collectives", "parity", "paths")) < 600


@pytest.mark.slow
@pytest.mark.parametrize("script", ["no_gpu.py", "session.py"])
def test_session_without_a_gpu_is_one_line(script, tmp_path):
    paths = f"{REPO}:{REPO}/tests/gpu"
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, REPO / "tests/gpu" / script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    line = "no GPU tests: torch finds no GPU. Run them on a machine with an NVIDIA GPU\n"
    assert done.stderr == line


def test_make_targets_check_for_a_gpu_first():
    text = (REPO / "Makefile").read_text()
    target = re.search(r"\ntest-gpu: .*\n((?:\t.*\n)+)", text)[1].splitlines()
    assert "no_gpu.py" in target[0] and "TEST_DEVICE=cuda" in target[1]
    assert "session.py" in re.search(r"\ngpu: .*\n((?:\t.*\n)+)", text)[1]


def test_no_gpu_returns_the_problem(monkeypatch):
    monkeypatch.setattr(no_gpu.gpus, "problem", lambda *_, **named: "no driver")
    assert no_gpu.problem() == "no driver"
    monkeypatch.setattr(no_gpu.gpus, "problem", lambda *_, **named: "")
    monkeypatch.setattr(no_gpu.gpus, "available", lambda: True)
    assert no_gpu.problem() == ""


def test_build_on_gpus_requires_nccl():
    for gpus, nccl, lacks in (([], 0, False), (["H200"], 0, True), (["H200"], 23007, False)):
        assert build.lacks_nccl({"gpus": gpus, "nccl_built": nccl}) == lacks


def test_profiling_counts_waits_by_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wait = "called a synchronizing CUDA operation"
        for number, text in ((3, wait), (3, "other"), (5, wait)):
            for _ in range(2):
                warnings.warn_explicit(text, UserWarning, str(REPO / "job/train.py"), number)
    assert profiling.count_waits(caught, 2) == {"job/train.py:3": 1.0, "job/train.py:5": 1.0}


def test_carry_pins_everything_except_torch():
    few, every = carry.names(everything=False), carry.names(everything=True)
    assert {"cffi", "pycparser", "pytest", "setuptools"} <= set(few) < set(every)
    assert not carry.TORCH & set(every) and {"numpy", "scipy"} <= set(every)
    assert set(every) <= carry.pinned().keys()
    script = (REPO / "docker/build_horovod.sh").read_text()
    assert f"version={carry.HOROVOD.partition('==')[2]}\n" in script and carry.CMAKE in script


def test_carry_unpacks_images_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "mnist.zip", "w") as archive:
        archive.writestr("train/0/a.png", b"image")
    targets = {"mnist": tmp_path / "out/mnist", "other": tmp_path / "out/other"}
    assert carry.unpack_images(tmp_path, targets) == ["mnist"]
    image = tmp_path / "out/mnist/train/0/a.png"
    assert image.read_bytes() == b"image"
    image.write_bytes(b"kept")
    carry.unpack_images(tmp_path, targets)
    assert image.read_bytes() == b"kept"


@pytest.mark.slow
def test_carry_environment_has_this_torch(tmp_path):
    python = carry.sees_torch(tmp_path / "venv")
    query = "import importlib.util as i, sys; print(sys.prefix, i.find_spec('torch').origin)"
    done = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    prefix, torch = done.stdout.split()
    assert prefix == str(tmp_path / "venv") and torch.startswith(sys.prefix)
