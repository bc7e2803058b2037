"""Runs of strangers: mgd-watch and mgd-report neither hang on their files, nor fill the memory, nor obey what is in them."""

import json
import math
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from job.errors import RunError
from job.show.report import app as report, features
from job.show.watch import app as watch
from job.show.read.history import MOST_COLUMNS, read_options, read_run
from job.show.read.discover import find, inside
from job.show.read.runs import MOST_RUNS, find_runs
from job.text import printable
from tests.unit.show.test_watch import UNICODE, begin, record, remark, start, write_run

LIMITED = ["bash", "-c", 'ulimit -v 16000000; exec "$0" "$@"', sys.executable]
EVIL = "\033]0;title\a\033[2J\n\r\u202ebidi\x9b"
BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def leave_options_to(run, name):
    """Take the start with its options from a run's records if `name` is config.yaml, as in a run of an earlier version."""
    if name == "config.yaml":
        first, *others = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(others))


def append(name, text):
    """What adds text to a file of a run."""

    def add(run):
        leave_options_to(run, name)
        with open(run / name, "a") as file:
            file.write(text)

    return add


def replace(name, make):
    """What puts another thing in place of a file of a run."""

    def change(run):
        leave_options_to(run, name)
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return change


def endless(path):
    with open(path, "wb") as file:
        file.truncate(2**40)  # no byte of it is on the disk


def make_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)  # a path of any length


SPECIAL = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terabyte": endless,
}
FILES = ("config.yaml", "metrics.jsonl", "complete")
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
    "a long line": append("metrics.jsonl", json.dumps(remark("x" * 10**7)) + "\n"),
    "odd numbers": append(
        "metrics.jsonl",
        "".join(
            json.dumps(
                start(workers=number, steps_an_epoch=number) | {"time": float(number % 10**300)}
            )
            + "\n"
            + json.dumps(
                {
                    "kind": "saved",
                    "time": math.nan,
                    "epoch": 1,
                    "step": 0,
                    "path": "x",
                    "seconds": math.inf,
                }
            )
            + "\n"
            for number in (-1, 2**62, int("9" * 900))
        ),
    ),
    "any kind": append(
        "metrics.jsonl",
        '{"kind": ["step"], "loss": 1}\n{"kind": {}, "time": 1}\n{"kind": "add", "text": "x"}\n',
    ),
    "many stages": append(
        "metrics.jsonl",
        "".join(
            json.dumps({"epoch": 1, "step": 0, "stage": n, "changed": 0.5}) + "\n"
            for n in range(5000)
        ),
    ),
    "many distillers": append(
        "metrics.jsonl",
        "".join(
            json.dumps(
                {
                    "epoch": 1,
                    "step": 0,
                    "stage": 1 + n % 9,
                    "changed": 0.5,
                    "distiller": f"$_{n}{EVIL}" * 99,
                }
            )
            + "\n"
            for n in range(500)
        ),
    ),
    "many columns": append(
        "metrics.jsonl",
        "".join(json.dumps(record(n) | {f"x{n}": 1.0}) + "\n" for n in range(15, 3000)),
    ),
    "escapes": append(
        "metrics.jsonl",
        json.dumps(remark(EVIL)) + "\n" + json.dumps(remark(f"<script>{EVIL}")) + "\n",
    ),
    "steps at the end": append(
        "metrics.jsonl", json.dumps(record(15) | {"steps": 2**62, "epoch": -(2**62)}) + "\n"
    ),
    "1²": lambda run: None,
    f"name {EVIL}<script>alert('\"')</script>".replace("/", "-"): lambda run: None,
}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A folder of runs, each with one thing that could do harm."""
    folder = tmp_path_factory.mktemp("strangers")
    for name, harm in (REFUSED | READ).items():
        harm(write_run(folder / name))
    (folder / f"{EVIL}.log").write_text(f"{begin('9' * 4000, EVIL)}error: {EVIL}{'y' * 10**7}\n")
    os.mkfifo(folder / "pipe.log")
    (folder / "folder.log").mkdir()
    return folder


def run(program, *arguments):
    """Run a program with limits on its memory and time; return its exit code, and its lines on stdout and stderr."""
    command = [*LIMITED, "-m", f"job.show.{program}", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"COLUMNS": "300"}
    )
    lines, errors = done.stdout.split("\n"), done.stderr.split("\n")
    assert all(line.isprintable() for line in lines + errors)
    return done.returncode, lines, errors


@pytest.mark.slow
def test_watch_shows_runs_of_strangers(strangers):
    code, lines, errors = run("watch", "--once", strangers)
    assert (code, errors) == (0, [""])
    for name in REFUSED:
        assert [
            line for line in lines if f"/{name.split()[0]}: " in line and f"/{name}/" in line
        ], name
    for name in READ:
        assert [line for line in lines if f"/{printable(name)}: " in line], name


@pytest.mark.slow
def test_a_report_shows_runs_of_strangers(strangers, tmp_path):
    code, lines, errors = run(
        "report", "--no-features", strangers, "--out", tmp_path / "report.html"
    )
    assert code == 0, errors
    assert (
        len([line for line in errors if line.startswith("passed over: ")]) == len(REFUSED) + 1
    )  # the log
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and all(line.isprintable() for line in page.split("\n"))
    assert not list(tmp_path.glob("report-pictures/*script*"))


@pytest.mark.parametrize("program", [watch, report])
def test_an_error_line_holds_no_escapes(tmp_path, capsys, program):
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / EVIL)])
    out, error = capsys.readouterr()
    assert (
        out == ""
        and error[:-1].isprintable()
        and error.endswith("\n")
        and r"\x1b]0;title\x07" in error
    )


@pytest.mark.parametrize(("kind", "make"), SPECIAL.items())
def test_a_special_file_in_place_of_a_checkpoint_or_data_is_a_note(tmp_path, kind, make):
    folder = write_run(tmp_path / "run")
    make(folder / "checkpoint_0001_000000.pth.tar")
    (shown,) = find_runs([str(folder)])
    with pytest.raises(RunError):
        features.newest_student(shown.history)
    watched = watch.Watch([folder])
    watched.begin()
    assert "checkpoint_0001_000000.pth.tar" in "\n".join(watched.lines(200, UNICODE, False))


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a 1\nb: *a\n",
        "a: {b: 1}\n",
        "- 1\n",
        "a: !!python/name:os.system\n",
        "a: !!int x\n",
    ],
)
def test_a_config_that_no_program_writes_has_no_options(text):
    assert read_options(text) == {}


def test_options_are_numbers_words_and_lists():
    text = f"a: 1\nb: 2.5\nc: yes\nd: ''\ne: [1, 2]\nf:\nday: 2020-01-01\nhuge: 0x{'f' * 40}\n"
    assert read_options(text) == {"a": 1, "b": 2.5, "c": True, "d": "", "e": [1, 2], "f": None}


def test_a_record_of_new_names_each_time_fills_no_memory(tmp_path):
    READ["many columns"](write_run(tmp_path))
    assert len(read_run(tmp_path).steps) == MOST_COLUMNS


def test_links_that_lead_round_are_followed_once(tmp_path):
    for number in range(20):
        (tmp_path / f"link{number}").symlink_to(tmp_path)
    write_run(tmp_path / "zz/deep/run")
    (tmp_path / "zzz").symlink_to("zz/deep")
    assert list(inside(tmp_path, {})) == [tmp_path / "zz/deep/run", tmp_path / "zzz/run"]
    assert [place.path for place in find(tmp_path, {})] == [tmp_path / "zzz/run"]


def test_a_report_of_too_many_runs_is_refused(tmp_path):
    for number in range(MOST_RUNS + 1):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/log.txt").touch()
    with pytest.raises(RunError, match=f"^{MOST_RUNS + 1} runs: expected at most {MOST_RUNS}"):
        find_runs([str(tmp_path)])


def test_an_unreadable_entry_hides_no_run(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "a").symlink_to("a")  # to itself
    (tmp_path / "b").symlink_to("x" * 300)
    assert [place.path for place in find(tmp_path, {})] == [tmp_path / "run"]


@pytest.mark.parametrize("size", [0, 7, 513, 10**9, "64", None, 1.5, [64]])
def test_images_are_not_read_at_a_size_that_takes_all_memory(size):
    with pytest.raises(RunError, match="image_size"):
        features.checked({"image_size": size})


def test_odd_options_of_a_checkpoint_become_words():
    options = features.checked(
        {"image_size": 64, "data": [1], "teacher_arch": ["resnet50"], "seed": 1}
    )
    known = {"image_size": 64, "teacher": "", "teacher_arch": "", "teacher_size": 0}
    assert options == known | {"places": ["[1]"]}


@pytest.mark.parametrize("size", [7, 1025, 10**9, "64", None, 1.5])
def test_a_teacher_s_images_have_no_size_that_takes_all_memory(size):
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
def test_a_matching_of_other_networks_is_refused(matching, fits):
    assert features.fits(matching, 2, 4) is fits


def test_text_that_prints_stays_and_numbers_stay_numbers():
    assert printable("Zoë 猫 a\\b") == "Zoë 猫 a\\b" and report.cleaned(np.pi) == np.pi
