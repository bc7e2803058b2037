"""Features of job.embed over several workers: bytes, resume, stop and errors."""

import errno
import hashlib
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from job.cluster import comm
from job.cluster.objects import allgather, broadcast
from job.cluster.stop import Stopped
from job.embed import EmbedConfig, compute_all
from job.data.splits import Splits, find_images
from job.errors import RunError
from job.evaluate import features, rows
from job.evaluate.features import Pass, split_groups
from job.evaluate.rows import JOURNAL, ROWS, Rows
from job.networks import build_resnet, with_features
from runs import Kept

GROUP = 4
# Images: 6 and 2 groups. The last round of four workers is not full.
TRAIN, VAL, GROUPS = 21, 5, 8


@pytest.fixture
def run(run, monkeypatch):
    monkeypatch.setattr(run, "log", Kept())
    monkeypatch.setattr(features, "GROUP", GROUP)
    return run


@pytest.fixture
def work(run, tmp_path, monkeypatch):
    """Images of noise on each worker (three undecodable), a network and options."""
    generator = np.random.default_rng(0)
    for number in range(TRAIN + VAL):
        path = tmp_path / ("train" if number < TRAIN else "val") / "a" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    for name in ("train/a/00.png", "train/a/13.png", "val/a/25.png"):
        (tmp_path / name).write_bytes(b"no image")
    torch.manual_seed(0)
    net = build_resnet("resnet18", stem="small", width=16)
    encoder = with_features(net, [], output="flatten").eval().requires_grad_(False)
    config = EmbedConfig(data="DIR", pretrained="FILE", out="OUT.npy", image_size=16)
    monkeypatch.chdir(tmp_path)  # the paths in messages are the same on all workers
    splits = Splits(find_images("."))
    return SimpleNamespace(
        run=run,
        splits=splits,
        encoder=encoder,
        config=config,
        folder=str(tmp_path / "part"),
        width=net.fc.in_features,
    )


def computed(work, folder=None, **options):
    """Compute the groups that rank 0's folder lacks, and return the numbers of bad images."""
    store = Rows(folder or work.folder, {}, work.width)
    compute = Pass(work.encoder, 16, "float32", 0, work.run)
    config = EmbedConfig(**{**vars(work.config), **options})
    try:
        return compute_all(compute, work.splits, store, *work.run.on_first(store.open), config)
    finally:
        store.close()


def digests(folder):
    """Return the digests of rank 0's files, on all workers."""
    values = None
    if comm.rank() == 0:
        contents = [open(f"{folder}/{name}", "rb").read() for name in (JOURNAL, ROWS)]
        values = [hashlib.sha256(content).hexdigest() for content in contents]
    return broadcast(values)


def digests_of_one_worker(work, folder):
    """Compute all groups in this process only and return the digests."""
    store = Rows(folder, {}, work.width)
    store.open()
    compute = Pass(work.encoder, 16, "float32", 0, work.run)
    for split in work.splits.parts:
        crops = features.MarkedCrops(split.images, 16)
        for group in split_groups(split.images):
            items = [crops[index] for index in group]
            decodable = torch.tensor([item[1] for item in items])
            texts = [item[2][0].split(": ")[1] if item[2] else "" for item in items]
            numbers = [split.first + index for index in group]
            bad = {number: text for number, text in zip(numbers, texts, strict=True) if text}
            pixels = torch.stack([item[0].permute(1, 2, 0) for item in items]).permute(0, 3, 1, 2)
            store.append(compute.forward(pixels)[decodable].numpy(), bad)
    store.close()
    contents = [open(f"{folder}/{name}", "rb").read() for name in (JOURNAL, ROWS)]
    return [hashlib.sha256(content).hexdigest() for content in contents]


def test_bytes_equal_one_worker_s(work):
    bad = computed(work)
    assert allgather(sorted(bad), "bad") == [[0, 13, 25]] * comm.size()
    assert digests(work.folder) == digests_of_one_worker(work, f"{work.folder}-one")
    lines = [line for line in work.run.log.lines if line.startswith("cannot decode")]
    paths = ["train/a/00.png", "train/a/13.png", "val/a/25.png"]
    text = "no image of a known format; it has no row"
    assert lines == [f"cannot decode ./{path}: {text}" for path in paths]


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, GROUPS])
def test_resume_computes_only_the_missing_groups(work, monkeypatch, done):
    """The bytes are the same for any number of complete groups."""
    computed(work)
    expected = digests(work.folder)
    if comm.rank() == 0:
        lines = open(f"{work.folder}/{JOURNAL}", "rb").read().splitlines(keepends=True)
        with open(f"{work.folder}/{JOURNAL}", "wb") as file:
            file.writelines(lines[:done])
    passes = []
    forward = Pass.forward
    counted = lambda self, pixels: passes.append(1) or forward(self, pixels)  # noqa: E731
    monkeypatch.setattr(Pass, "forward", counted)
    bad = computed(work)
    assert sum(allgather(len(passes), "passes")) == GROUPS - done
    assert allgather(sorted(bad), "bad") == [[0, 13, 25]] * comm.size()
    assert digests(work.folder) == expected


def test_signal_to_one_worker_stops_all(work, monkeypatch):
    """All stop after the same round, and its rows are kept."""
    rounds = []
    forward = Pass.forward

    def signalled(self, pixels):
        rounds.append(1)
        if work.run.rank == work.run.size - 1:
            monkeypatch.setattr(work.run.stop, "signal", signal.SIGTERM)
        return forward(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Pass, "forward", signalled)
        try:
            computed(work)
            stopped = False
        except Stopped:
            stopped = True
    monkeypatch.setattr(work.run.stop, "signal", None)
    assert all(allgather(stopped, "stopped"))
    store = Rows(work.folder, {}, work.width)
    done, _ = work.run.on_first(store.open)
    store.close()
    expected = min(2 * comm.size(), 6)  # the signal's round and the next. train/ has 6 groups
    assert done == expected and sum(allgather(len(rounds), "rounds")) == expected
    computed(work)
    assert digests(work.folder) == digests_of_one_worker(work, f"{work.folder}-one")


def refused(work, **options):
    """Return the error of all workers and its exit code."""
    try:
        computed(work, **options)
        outcome = ["", 0]
    except RunError as error:
        outcome = [str(error), error.code]
    everywhere = allgather(outcome, "errors")
    assert everywhere == [everywhere[0]] * comm.size()
    return outcome


def test_too_many_bad_images_end_all_workers(work):
    text = "3 of 26 images cannot be decoded, and --max-bad-images is 2; "
    text += "the first: ./train/a/00.png"
    assert refused(work, max_bad_images=2) == [text, 2]
    assert refused(work, max_bad_images=3) == ["", 0]


def test_full_disk_ends_all_workers(work, monkeypatch):
    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "write", full)
        message, code = refused(work)
    assert (
        "No space left on device. Make room, and resume with the same command" in message
        and code == 1
    )
    computed(work)
    assert digests(work.folder) == digests_of_one_worker(work, f"{work.folder}-one")


def test_features_not_finite_end_all_workers(work, monkeypatch):
    forward = Pass.forward
    last = work.run.rank == min(work.run.size, 6) - 1
    divisor = 0 if last else 1
    monkeypatch.setattr(Pass, "forward", lambda self, pixels: forward(self, pixels) / divisor)
    message, code = refused(work)
    assert "FILE: features that are not finite" in message and code == 1
