"""Reports of real runs, in a real browser."""

import base64
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from job.errors import RunError
from job.pack import main as pack
from job.show.report import features, tables
from job.show.report.images import slugs_of
from job.show.report.app import main, render
from job.show.read.runs import ReportRun, find_runs
from job.show.report.timing import knn_seconds, refresh_seconds
from runs import of_kind

CURVES = {
    "loss",
    "parts",
    "accuracy",
    "knn",
    "rate",
    "stability",
    "cost",
    "collapse",
    "time",
    "speed",
}
NETWORKS = {"maps-run-1", "maps-run-2", "maps-run-3", "maps-run-4", "neighbours-run", "embedding"}
WITHOUT_HOROVOD = """
import sys
sys.modules["horovod"] = None
from job.show.report.app import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    """The report of both, written by a process without Horovod."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    command = [sys.executable, "-c", WITHOUT_HOROVOD, *map(str, folders), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {out}: ")
    return out


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def pictures(out):
    return {path.stem for path in out.with_name(f"{out.stem}-pictures").iterdir()}


def report(tmp_path, *arguments):
    """Write a report in this process. Return its file and its text without pictures."""
    out = tmp_path / "report.html"
    main([*map(str, arguments), "--out", str(out)])
    return out, re.sub(r"data:image/png;base64,[^\"]*", "", out.read_text())


def copy_half(folder, copy):
    """Copy a run with the first half of its lines, the last one incomplete."""
    shutil.copytree(folder, copy, symlinks=True)
    (copy / "complete").unlink()
    for name in ("metrics.jsonl", "log.txt"):
        text = (copy / name).read_text()
        (copy / name).write_text(text[: len(text) // 2])
    for checkpoint in copy.glob("checkpoint_0002_*"):
        checkpoint.unlink()
    return copy


@pytest.mark.short
def test_page_and_folder_have_all_pictures(page):
    assert pictures(page) == CURVES | NETWORKS | {"linear"}
    text = page.read_text()
    for name in pictures(page):
        png = page.with_name("report-pictures") / f"{name}.png"
        assert base64.b64encode(png.read_bytes()).decode() in text
        with Image.open(png) as image:
            assert np.asarray(image.convert("L")).std() > 5, f"{name} is empty"


@pytest.mark.short
def test_page_needs_no_network_and_has_no_errors(page, browser):
    browser.get_log("performance")
    browser.get(page.as_uri())
    widths = browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
        ".then(done, error => done(String(error)))"
    )
    assert len(widths) == len(pictures(page))
    assert min(widths) > 500
    assert (
        browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        < 2000
    )  # ms
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in requested
    assert [url for url in requested if not url.startswith(("data:", page.as_uri()))] == []
    assert page.stat().st_size < 10e6
    broken_links = (
        "[...document.querySelectorAll('nav a')]"
        ".filter(a => !document.querySelector(a.getAttribute('href')))"
    )
    assert browser.execute_script(f"return {broken_links}.length") == 0
    short_alts = "[...document.images].filter(i => i.alt.length < 20)"
    assert browser.execute_script(f"return {short_alts}.length") == 0


@pytest.mark.parametrize("width", [400, 1200])
def test_page_is_as_wide_as_the_screen(page, browser, width):
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth - {root}.clientWidth") == 0
    assert browser.execute_script("return innerWidth") == width


def test_page_can_be_printed(page, browser):
    browser.get(page.as_uri())
    pdf = base64.b64decode(browser.print_page())
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 3


@pytest.mark.short
def test_links_lead_to_checkpoints(page, folders):
    links = re.findall(r'href="([^"#]+\.pth\.tar)"', page.read_text())
    assert {(page.parent / link).resolve() for link in links} == {
        path.resolve() for folder in folders for path in folder.glob("[bc]*.pth.tar")
    }


@pytest.mark.short
def test_tables_show_the_runs(folders):
    runs = find_runs(map(str, folders))
    [row] = tables.linear_results(runs).rows
    accuracies = [record["val_top1"] for record in runs[1].history.validation]
    assert row[:3] == ["run-linear", "run", "resnet18"]
    assert row[4] == f"{max(accuracies):.2f} %"
    narrow = find_runs([str(folders[0])])
    narrow[0].history.options.update(width=16)
    networks = [tables.overview(some).rows[0][2] for some in (runs, narrow)]
    assert networks == ["resnet18", "resnet18 of width 16"]


def test_options_table_shows_differences(folders):
    """A run without --loss-share is from a version that had only factors."""
    one, other, old = (find_runs([str(folders[0])])[0].history for _ in range(3))
    twins = [ReportRun("a", 0, one), ReportRun("b", 1, one)]
    assert tables.options_of(twins, differing=True).rows == []
    one.options.update(lr=0.5)
    three = [*twins, ReportRun("c", 2, other)]
    assert tables.options_of(three, differing=True).rows == [["lr", "0.5", "0.5", "0.03"]]
    del old.options["loss_share"], old.options["width"]
    versions = [ReportRun("now", 0, other), ReportRun("old", 1, old)]
    assert tables.options_of(versions, differing=True).rows == [["loss_share", "10.0", "0.0"]]


def test_times_are_of_the_records(folders):
    """Each stage of a refresh has the times of all its stages."""
    history = find_runs([str(folders[0])])[0].history
    refreshes = [record for record in of_kind(folders[0], "refresh") if record["stage"] == 1]
    assert len(refreshes) == 2
    seconds = sum(
        record[name] for record in refreshes for name in ("measuring", "gathering", "solving")
    )
    assert refresh_seconds(history) == pytest.approx(seconds)
    [start], [end] = (of_kind(folders[0], kind) for kind in ("start", "end"))
    assert 0 < knn_seconds(history) < knn_seconds(history) + seconds < end["time"] - start["time"]


def test_warnings_are_of_the_records(folders, tmp_path):
    """The run itself has one warning: its queue is too long for its images."""
    copy = tmp_path / "run"
    shutil.copytree(folders[0], copy, symlinks=True)
    with open(copy / "metrics.jsonl", "a") as file:
        for kind, text in (("hint", "slow"), ("hint", "slow")):
            file.write(json.dumps({"kind": kind, "time": 1.8e9, "text": text}) + "\n")
        file.write(
            json.dumps({"kind": "end", "time": 1.8e9, "how": "error", "text": "no disk", "code": 2})
            + "\n"
        )
    first, *others = tables.warnings(find_runs([str(copy)]))["run"]
    assert first.startswith("warning: ") and others == ["hint: slow (2 times)", "error: no disk"]


def test_matched_maps_are_of_the_networks(folders, teacher_file):
    """The channels are of the checkpoint's matching, cheapest first, with costs as a slow sum."""
    [run, _] = find_runs(map(str, folders))
    student = features.newest_student(run.history)
    sample = features.read_sample(tuple(student.options["data"]), 32)
    teacher = features.read_teacher(student, str(teacher_file))
    matches = features.matches(student, teacher, sample.views)
    assert sorted(matches) == [1, 2, 3, 4]
    for stage, pairs in matches.items():
        assert [match.mean for match in pairs] == sorted(match.mean for match in pairs)
        for match in pairs:
            a, b = match.channels
            assert b in student.matchings[stage][:, a] and match.cost <= match.mean
    of_shown = features.matches(student, teacher, sample.views[: features.SHOWN])[2]
    compared = []
    for match in matches[2]:
        s, t = (torch.tensor(maps).flatten(1) for maps in (match.student, match.teacher))
        assert len(s) == features.SHOWN
        slow = sum(
            (x / x.norm() - y / y.norm()).square().sum().item() for x, y in zip(s, t, strict=True)
        ) / len(s)
        compared += [(same.cost, slow) for same in of_shown if same.channels == match.channels]
    assert compared and all(cost == pytest.approx(slow, abs=1e-4) for cost, slow in compared)


def test_running_run_is_shown_as_running(folders, tmp_path):
    running = copy_half(folders[0], tmp_path / "running")
    out, text = report(tmp_path, running)
    assert "running (last write" in text
    assert pictures(out) >= {"loss", "maps-running-1", "neighbours-running", "embedding"}


def test_run_without_steps_is_shown(folders, tmp_path):
    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(folders[0] / "config.yaml", started)
    out, text = report(tmp_path, started)
    assert pictures(out) == set()
    assert "No run has recorded a training step" in text
    assert "started has no checkpoint yet" in text


def test_damaged_lines_are_counted_and_skipped(folders, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders[0], damaged, symlinks=True)
    lines = (damaged / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (damaged / "metrics.jsonl").write_bytes(
        b"".join([*lines[:5], b"\x00\xff\n", b"[1]\n", *lines[5:]])
    )
    out, text = report(tmp_path, damaged, "--no-features")
    assert "damaged: 2 lines of metrics.jsonl" in text
    assert pictures(out) == CURVES


def test_pictures_without_data_or_teacher_are_omitted(folders, tmp_path):
    out, text = report(tmp_path, folders[0], "--data", tmp_path / "nowhere")
    assert pictures(out) == CURVES
    assert f"{tmp_path}/nowhere: no such folder" in text
    out, text = report(tmp_path, folders[0], "--teacher", tmp_path / "nothing.pth")
    assert pictures(out) == CURVES | {"neighbours-run", "embedding"}
    assert f"{tmp_path}/nothing.pth: no such file" in text


def test_packed_data_has_the_same_pictures(folders, images, tmp_path):
    pack([str(images), str(tmp_path / "packed")])
    samples = [features.read_sample((str(data),), 32) for data in (images, tmp_path / "packed")]
    assert [len(sample.views) for sample in samples] == [9, 9]
    out, _ = report(tmp_path, folders[0], "--data", tmp_path / "packed")
    assert pictures(out) == CURVES | NETWORKS


def test_array_has_a_label_for_each_run(folders, tmp_path):
    for name in ("10", "9"):
        shutil.copytree(folders[0], tmp_path / "array" / name, symlinks=True)
    (tmp_path / "array" / "empty").mkdir()
    runs = find_runs([str(tmp_path / "array"), str(folders[0]), str(tmp_path / "array/9")])
    assert [run.label for run in runs] == ["array/9", "array/10", "run"]
    assert len({run.index for run in runs}) == 3


def test_unreadable_runs_among_others_are_skipped(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no run")
    runs = find_runs(
        map(str, [tmp_path / "empty", folders[0], tmp_path / "text", tmp_path / "missing"])
    )
    assert [run.label for run in runs] == ["run"]
    assert capsys.readouterr().err.count("skipped: ") == 3


def test_names_with_any_characters_are_shown(folders, tmp_path):
    """Pictures have unique names. Legends show names that have a meaning in matplotlib."""
    names = [
        "a b",
        "a-b",
        "_under",
        "dollar$a$b_^{",
        "x" * 80,
        b"bad\xff".decode(errors="surrogateescape"),
    ]
    for name in names:
        shutil.copytree(folders[0], tmp_path / "runs" / name, symlinks=True)
    out, text = report(tmp_path, tmp_path / "runs", "--no-features")
    assert pictures(out) == CURVES
    for name in [*names[:-1], r"bad\udcff"]:
        assert f'<th scope="row">{name}</th>' in text
    assert len(set(slugs_of(names).values())) == len(names)


def test_linear_run_only_is_shown(folders, tmp_path):
    copy = tmp_path / "classifier"
    shutil.copytree(folders[1], copy, symlinks=True)
    (copy / "config.yaml").unlink()
    for arguments in ([folders[1]], [copy, "--no-features"], [copy]):
        out, text = report(tmp_path, *arguments)
        assert pictures(out) >= {"linear"} and "No run has recorded a training step" not in text


def test_names_cannot_break_the_page(folders, tmp_path):
    hostile = tmp_path / "<script>alert(1)</script>".replace("/", "-")
    shutil.copytree(folders[0], hostile, symlinks=True)
    out, text = report(tmp_path, hostile, "--no-features")
    assert "<script" not in text


def test_failed_write_keeps_the_old_report(folders, tmp_path):
    out, _ = report(tmp_path, folders[0], "--no-features")
    before = out.read_bytes()
    (tmp_path / "report.html.new").mkdir()
    with pytest.raises(SystemExit) as end:
        main([str(folders[0]), "--no-features", "--out", str(out)])
    assert end.value.code == 1
    assert out.read_bytes() == before


def test_pictures_are_deterministic(folders, tmp_path):
    first, second = (
        render(find_runs([str(folders[0])]), tmp_path / "report.html", ("", ""))[1]
        for _ in range(2)
    )
    assert [picture.png for picture in first] == [picture.png for picture in second]


def test_damaged_newest_checkpoint_is_skipped(folders, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folders[0], copy, symlinks=True)
    history = find_runs([str(copy)])[0].history
    history.checkpoints[-1].write_bytes(history.checkpoints[-1].read_bytes()[:1000])
    assert features.newest_student(history).checkpoint == str(history.checkpoints[-2])
    for path in history.checkpoints:
        path.write_bytes(b"")
    with pytest.raises(RunError):
        features.newest_student(history)
