"""Hostile files of runs: mgd-watch and mgd-report need little time and memory, and run no code."""

import math
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from job.errors import RunError
from job.show.report import app as report, features, matching
from job.show.watch import app as watch
from job.show.read.history import MOST_COLUMNS, read_options, read_run
from job.show.read.discover import find, inside
from job.show.read.runs import MOST_RUNS, find_runs
from job.text import printable
from tests.unit.show.test_watch import UNICODE, jsonl, record, remark, start, start_try, write_run

LIMITED = ["bash", "-c", 'ulimit -v 16000000; exec "$0" "$@"', sys.executable]
EVIL = "\033]0;title\a\033[2J\n\r\u202ebidi\x9b"
BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def remove_start(run, name):
    """If `name` is config.yaml, remove the start with its options, as in an earlier version."""
    if name == "config.yaml":
        first, *others = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(others))


def append(name, text):
    """Return a function that appends text to a file of a run."""

    def add(run):
        remove_start(run, name)
        with open(run / name, "a") as file:
            file.write(text)

    return add


def replace(name, make):
    """Return a function that replaces a file of a run."""

    def change(run):
        remove_start(run, name)
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return change


def endless(path):
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse file


def make_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)  # a path of any length


SPECIAL = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terabyte": endless,
}
FILES = ("config.yaml", "metrics.jsonl", "complete")
SAVED = {"kind": "saved", "time": math.nan, "epoch": 1, "step": 0, "path": "x", "seconds": math.inf}
REFUSED = {
    f"{name} {kind}": replace(name, make) for name in FILES for kind, make in SPECIAL.items()
}
READ = {
    "aliases": append("config.yaml", f"{BOMB}batch_size: *i\n"),
    "merge keys": append(
        "config.yaml",
        "\n".join(f"{b}: &{b} {{<<: [*{a}, *{a}], {b}: 1}}" for a, b in ("ab", "bc", "cd")),
    ),
    "deep config": append("config.yaml", f"lr: {'[' * 30000}"),
    "huge numbers": append(
        "config.yaml", f"lr: 0x{'f' * 9000}\nimage_size: {'9' * 9000}\nmomentum: .inf\n"
    ),
    "endless epochs": append(
        "config.yaml", f"epochs: {2**62}\nteacher: t\nrefresh_epochs: every:3\n"
    ),
    "deep records": append("metrics.jsonl", "[" * 10**6 + "\n" + '{"loss":' * 10**5 + "\n"),
    "a long line": append("metrics.jsonl", jsonl(remark("x" * 10**7))),
    "unusual numbers": append(
        "metrics.jsonl",
        "".join(
            jsonl(start(workers=number, steps_an_epoch=number, time=float(number % 10**300)), SAVED)
            for number in (-1, 2**62, int("9" * 900))
        ),
    ),
    "huge losses": append("metrics.jsonl", jsonl(record(15, 1e308), record(16, -1e308))),
    "any kind": append(
        "metrics.jsonl",
        '{"kind": ["step"], "loss": 1}\n{"kind": {}, "time": 1}\n{"kind": "add", "text": "x"}\n',
    ),
    "many stages": append(
        "metrics.jsonl",
        jsonl(*({"epoch": 1, "step": 0, "stage": n, "changed": 0.5} for n in range(5000))),
    ),
    "many distillers": append(
        "metrics.jsonl",
        jsonl(
            *(
                {
                    "epoch": 1,
                    "step": 0,
                    "stage": 1 + n % 9,
                    "changed": 0.5,
                    "distiller": f"$_{n}{EVIL}" * 99,
                }
                for n in range(500)
            )
        ),
    ),
    "many columns": append(
        "metrics.jsonl",
        jsonl(*(record(n) | {f"x{n}": 1.0} for n in range(15, 3000))),
    ),
    "escapes": append(
        "metrics.jsonl",
        jsonl(remark(EVIL), remark(f"<script>{EVIL}")),
    ),
    "steps at the end": append(
        "metrics.jsonl", jsonl(record(15) | {"steps": 2**62, "epoch": -(2**62)})
    ),
    "1²": lambda run: None,
    f"name {EVIL}<script>alert('\"')</script>".replace("/", "-"): lambda run: None,
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of runs, each with one harmful file or name."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, change in (REFUSED | READ).items():
        change(write_run(folder / name))
    (folder / f"{EVIL}.log").write_text(
        f"{start_try('9' * 4000, EVIL)}error: {EVIL}{'y' * 10**7}\n"
    )
    os.mkfifo(folder / "pipe.log")
    (folder / "folder.log").mkdir()
    return folder


def run(program, *arguments):
    """Run a program with limited memory and time. Return its exit code, output and error lines."""
    command = [*LIMITED, "-m", f"job.show.{program}", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"COLUMNS": "300"}
    )
    lines, errors = done.stdout.split("\n"), done.stderr.split("\n")
    assert all(line.isprintable() for line in lines + errors)
    return done.returncode, lines, errors


@pytest.mark.slow
@pytest.mark.short
def test_watch_shows_hostile_runs(hostile):
    code, lines, errors = run("watch", "--once", hostile)
    assert (code, errors) == (0, [""])
    for name in REFUSED:
        assert [
            line for line in lines if f"/{name.split()[0]}: " in line and f"/{name}/" in line
        ], name
    for name in READ:
        assert [line for line in lines if f"/{printable(name)}: " in line], name


@pytest.mark.slow
@pytest.mark.short
def test_report_shows_hostile_runs(hostile, tmp_path):
    code, lines, errors = run("report", "--no-features", hostile, "--out", tmp_path / "report.html")
    assert code == 0, errors
    skipped = [line for line in errors if line.startswith("skipped: ")]
    assert len(skipped) == len(REFUSED) + 1  # the log
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and all(line.isprintable() for line in page.split("\n"))
    assert not list(tmp_path.glob("report-pictures/*script*"))


def test_report_leaves_out_costs_that_overflow(tmp_path):
    folder = write_run(tmp_path / "run")
    refresh = {"epoch": 1, "step": 0, "stage": 1, "changed": 0.5}
    costs = {"cost_before": 1e308, "cost_after": -1e308}
    append("metrics.jsonl", jsonl(refresh | costs))(folder)
    assert matching.cost(find_runs([str(folder)]))


@pytest.mark.parametrize("program", [watch, report])
def test_error_line_has_no_escapes(tmp_path, capsys, program):
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / EVIL)])
    out, error = capsys.readouterr()
    assert out == "" and error[:-1].isprintable() and error.endswith("\n")
    assert r"\x1b]0;title\x07" in error


@pytest.mark.parametrize(("kind", "make"), SPECIAL.items())
def test_special_file_as_checkpoint_is_a_note(tmp_path, kind, make):
    folder = write_run(tmp_path / "run")
    make(folder / "checkpoint_0001_000000.pth.tar")
    [listed] = find_runs([str(folder)])
    with pytest.raises(RunError):
        features.newest_student(listed.history)
    runs = watch.Watch([folder])
    runs.start()
    assert "checkpoint_0001_000000.pth.tar" in "\n".join(runs.lines(200, UNICODE, False))


def test_options_are_numbers_text_and_lists():
    text = f"a: 1\nb: 2.5\nc: yes\nd: ''\ne: [1, 2]\nf:\nday: 2020-01-01\nhuge: 0x{'f' * 40}\n"
    assert read_options(text) == {"a": 1, "b": 2.5, "c": True, "d": "", "e": [1, 2], "f": None}


def test_columns_are_limited(tmp_path):
    READ["many columns"](write_run(tmp_path))
    assert len(read_run(tmp_path).steps) == MOST_COLUMNS


def test_loops_of_links_are_followed_once(tmp_path):
    for number in range(20):
        (tmp_path / f"link{number}").symlink_to(tmp_path)
    write_run(tmp_path / "zz/deep/run")
    (tmp_path / "zzz").symlink_to("zz/deep")
    assert list(inside(tmp_path, {})) == [tmp_path / "zz/deep/run", tmp_path / "zzz/run"]
    assert [source.path for source in find(tmp_path, {})] == [tmp_path / "zzz/run"]


def test_report_refuses_too_many_runs(tmp_path):
    for number in range(MOST_RUNS + 1):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/log.txt").touch()
    with pytest.raises(RunError, match=f"^{MOST_RUNS + 1} runs: expected at most {MOST_RUNS}"):
        find_runs([str(tmp_path)])


def test_unreadable_entry_hides_no_run(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "a").symlink_to("a")  # to itself
    (tmp_path / "b").symlink_to("x" * 300)
    assert [source.path for source in find(tmp_path, {})] == [tmp_path / "run"]


@pytest.mark.parametrize("size", [0, 7, 513, 10**9, "64", None, 1.5, [64]])
def test_image_size_out_of_range_is_refused(size):
    with pytest.raises(RunError, match="image_size"):
        features.checked({"image_size": size})


def test_invalid_options_of_a_checkpoint_become_text():
    options = features.checked(
        {"image_size": 64, "data": [1], "teacher_arch": ["resnet50"], "seed": 1}
    )
    known = {"image_size": 64, "teacher": "", "teacher_arch": "", "teacher_size": 0}
    assert options == known | {"data": ["[1]"]}


@pytest.mark.parametrize("size", [7, 1025, 10**9, "64", None, 1.5])
def test_teacher_size_out_of_range_is_refused(size):
    with pytest.raises(RunError, match="teacher_size"):
        features.checked({"image_size": 64, "teacher_size": size})
    assert features.checked({"image_size": 64, "teacher_size": 224})["teacher_size"] == 224


@pytest.mark.parametrize(
    ("matching", "fits"),
    [
        (torch.tensor([[0, 1], [2, 3]]), True),
        (torch.tensor([[0, 1], [2, 4]]), False),
        (torch.tensor([[0, -1], [2, 3]]), False),
        (torch.tensor([[0, 1, 2]]), False),
        (torch.tensor([0, 1]), False),
        (torch.tensor([[0.0, 1.0]]), False),
        (torch.zeros((1, 2), dtype=torch.int64).expand(3, 2), False),
        (torch.zeros((0, 2), dtype=torch.int64), False),
    ],
)
def test_fits_refuses_matchings_of_other_networks(matching, fits):
    assert features.fits(matching, 2, 4) is fits


def test_printable_text_and_numbers_stay():
    assert printable("Zoë 猫 a\\b") == "Zoë 猫 a\\b" and report.cleaned(np.pi) == np.pi
