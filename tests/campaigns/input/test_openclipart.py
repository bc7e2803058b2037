"""Debian's openclipart-png as it comes: 8,121 pictures in folders, links among them, some of 169 megapixels, three beyond all."""

import re
import time
from pathlib import Path

import psutil
import pytest
from runs import of_kind

PICTURES = Path("/usr/share/openclipart/png")
BEYOND = {  # more pixels than PIL decodes
    "computer/microchip_v.2_havok_redh_01.png": "231424000 pixels",
    "signs_and_symbols/stop_sign_miguel_s_nchez_.png": "623403000 pixels",
    "transportation/roadsigns/stop_sign_right_font_mig_.png": "623403000 pixels",
}
OPTIONS = "-a resnet18 --image-size 32 --aug-plus --mlp --moco-k 4096 --batch-size 290 --epochs 1 --warmup-epochs 0 -j 1".split()
MOST = 1500  # MB of a process: one picture of 169 megapixels has 676, Python with torch 400


@pytest.fixture
def linked(tmp_path):
    """A folder whose train/ has the pictures' folders, as links."""
    if not PICTURES.is_dir():
        pytest.skip(f"no {PICTURES} here: apt-get install --no-install-recommends openclipart-png")
    (tmp_path / "train").mkdir()
    for folder in PICTURES.iterdir():
        (tmp_path / "train" / folder.name).symlink_to(folder)
    return tmp_path


def peaks(process, found):
    """Note the largest memory, in MB, that each process below another has had so far."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
            found[child.pid] = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
        except (OSError, TypeError):
            continue  # it has ended


def test_the_whole_of_it_trains_for_an_epoch(linked, start_job, tmp_path):
    """All but one picture are in the 28 steps. Each worker has one loader process, which decodes one picture at a time."""
    begun, found = time.monotonic(), {}
    job = start_job(2, tmp_path / "run", [linked, *OPTIONS])
    while job.process.poll() is None:
        peaks(job.process, found)
        assert time.monotonic() < begun + 600
        time.sleep(0.2)
    output = job.finish()
    assert job.process.returncode == 0, output
    [start] = of_kind(tmp_path / "run", "start")
    assert (start["images"], start["steps_an_epoch"]) == (8121, 28)
    undecodable = [record["text"] for record in of_kind(tmp_path / "run", "undecodable")]
    named = dict(
        re.search(r"/train/(\S+): .*?(\d+ pixels)", text).groups()
        for text in undecodable
        if " pixels" in text
    )
    assert named == BEYOND and len(undecodable) == 3
    assert (tmp_path / "run" / "last.pth.tar").is_file()
    print(
        f"{time.monotonic() - begun:.0f} s; largest processes in MB: {sorted(map(round, found.values()))[-4:]}"
    )
    assert 700 < max(found.values()) < MOST
