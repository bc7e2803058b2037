"""Workers that call the program from Python, as a script under horovodrun."""

import json
import os

import pytest
import torch

from job.cluster import comm
from job.cluster.objects import allgather, broadcast
from job.config import Config
from job.errors import RunError
from job.metrics.callbacks import Callback
from job.train import train
from runs import write_images

OPTIONS = dict(arch="resnet18", stem="small", width=16, image_size=16, batch_size=8, epochs=1)
OPTIONS |= dict(moco_k=16, moco_dim=8, mlp=True, workers=0)


class Keep(Callback):
    def __init__(self, stop_at=0):
        self.records, self.stop_at = [], stop_at

    def record(self, record):
        self.records.append(record)
        if record["kind"] == "step" and record["steps"] == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def folder(tmp_path):
    """Rank 0's folder of a test, with images."""
    if comm.rank() == 0:
        write_images(tmp_path / "images")
    return broadcast(str(tmp_path))


def test_workers_train_one_run_after_the_other(folder):
    """All have the same result. Rank 0 has the records."""
    kept, results = [Keep(), Keep()], []
    threads = torch.get_num_threads()
    for name, callback in zip(("one", "two"), kept, strict=True):
        config = Config(data=f"{folder}/images", out=f"{folder}/{name}", **OPTIONS)
        found = train(config, [callback])
        numbers = found.numbers
        results.append([found.folder, found.checkpoint, numbers["steps"], numbers["loss"]])
    assert allgather(results, "results") == [results] * comm.size()
    assert results[0][2:] == results[1][2:]
    assert results[1][:3] == [f"{folder}/two", f"{folder}/two/last.pth.tar", 6]
    records = [callback.records for callback in kept]
    paths = [f"{folder}/{name}/metrics.jsonl" for name in ("one", "two")]
    written = [[json.loads(line) for line in open(path)] for path in paths]
    same = records == (written if comm.rank() == 0 else [[], []])
    assert allgather(same, "records") == [True] * comm.size()
    assert allgather(torch.get_num_threads() == threads, "threads") == [True] * comm.size()


def test_a_callback_of_rank_0_stops_all_workers_after_a_save(folder):
    config = Config(data=f"{folder}/images", out=f"{folder}/run", resume="auto", **OPTIONS)
    try:
        found = train(config, [Keep(stop_at=3)]).numbers
    except KeyboardInterrupt:
        found = os.path.exists(f"{folder}/run/checkpoint_0000_000004.pth.tar")
    assert allgather(found, "stopped") == [True] * comm.size()
    assert train(config).numbers["steps"] == 6


def test_an_error_is_raised_on_all_workers(folder):
    config = Config(data=f"{folder}/nowhere", out=f"{folder}/run", **OPTIONS)
    try:
        found = train(config).folder
    except RunError as error:
        found = str(error)
    [line] = set(allgather(found, "error"))
    assert "nowhere" in line and line != f"{folder}/run"
