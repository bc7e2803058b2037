"""Debian's openclipart-png: 8,121 pictures with links, up to 169 megapixels, 3 too large."""

import re
import time
from pathlib import Path

import psutil
import pytest
from runs import of_kind

PICTURES = Path("/usr/share/openclipart/png")
TOO_LARGE = {  # more pixels than PIL decodes
    "computer/microchip_v.2_havok_redh_01.png": "231424000 pixels",
    "signs_and_symbols/stop_sign_miguel_s_nchez_.png": "623403000 pixels",
    "transportation/roadsigns/stop_sign_right_font_mig_.png": "623403000 pixels",
}
OPTIONS = "-a resnet18 --image-size 32 --aug-plus --mlp --moco-k 4096 --batch-size 290".split()
OPTIONS += "--epochs 1 --warmup-epochs 0 -j 1".split()
LIMIT = 1500  # MB of a process: a picture of 169 megapixels needs 676, Python with torch 400


@pytest.fixture
def linked(tmp_path):
    """A folder with links to the pictures' folders in train/."""
    if not PICTURES.is_dir():
        pytest.skip(f"no {PICTURES} here: apt-get install --no-install-recommends openclipart-png")
    (tmp_path / "train").mkdir()
    for folder in PICTURES.iterdir():
        (tmp_path / "train" / folder.name).symlink_to(folder)
    return tmp_path


def update_peaks(process, peaks):
    """Update the peak of memory in MB of each child process, by its id."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peaks[child.pid] = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
        except (OSError, TypeError):
            continue  # it has ended


def test_openclipart_trains_for_an_epoch(linked, start_job, tmp_path):
    """The 28 steps have all pictures but one. A worker's loader process decodes one at a time."""
    start, peaks = time.monotonic(), {}
    job = start_job(2, tmp_path / "run", [linked, *OPTIONS])
    while job.process.poll() is None:
        update_peaks(job.process, peaks)
        assert time.monotonic() < start + 600
        time.sleep(0.2)
    output = job.finish()
    assert job.process.returncode == 0, output
    [record] = of_kind(tmp_path / "run", "start")
    assert (record["images"], record["steps_an_epoch"]) == (8121, 28)
    undecodable = [record["text"] for record in of_kind(tmp_path / "run", "undecodable")]
    logged = dict(
        re.search(r"/train/(\S+): .*?(\d+ pixels)", text).groups()
        for text in undecodable
        if " pixels" in text
    )
    assert logged == TOO_LARGE and len(undecodable) == 3
    assert (tmp_path / "run" / "last.pth.tar").is_file()
    largest = sorted(map(round, peaks.values()))[-4:]
    print(f"{time.monotonic() - start:.0f} s; largest processes in MB: {largest}")
    assert 700 < max(peaks.values()) < LIMIT
