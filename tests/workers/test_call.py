"""Calls of `job.train.train` from a Python script under horovodrun."""

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
    """A folder of rank 0 with images, the same path on all workers."""
    if comm.rank() == 0:
        write_images(tmp_path / "images")
    return broadcast(str(tmp_path))


def test_train_runs_twice_in_one_process(folder):
    """All workers return the same result. Only rank 0's callback gets the records."""
    kept, results = [Keep(), Keep()], []
    threads = torch.get_num_threads()
    for name, callback in zip(("one", "two"), kept, strict=True):
        config = Config(data=f"{folder}/images", out=f"{folder}/{name}", **OPTIONS)
        result = train(config, [callback])
        numbers = result.numbers
        results.append([result.folder, result.checkpoint, numbers["steps"], numbers["loss"]])
    assert allgather(results, "results") == [results] * comm.size()
    assert results[0][2:] == results[1][2:]
    assert results[1][:3] == [f"{folder}/two", f"{folder}/two/last.pth.tar", 6]
    records = [callback.records for callback in kept]
    paths = [f"{folder}/{name}/metrics.jsonl" for name in ("one", "two")]
    written = [[json.loads(line) for line in open(path)] for path in paths]
    same = records == (written if comm.rank() == 0 else [[], []])
    assert allgather(same, "records") == [True] * comm.size()
    assert allgather(torch.get_num_threads() == threads, "threads") == [True] * comm.size()


def test_callback_of_rank_0_stops_all_workers(folder):
    """They save a checkpoint first, and the run resumes from it."""
    config = Config(data=f"{folder}/images", out=f"{folder}/run", resume="auto", **OPTIONS)
    try:
        stopped = train(config, [Keep(stop_at=3)]).numbers
    except KeyboardInterrupt:
        stopped = os.path.exists(f"{folder}/run/checkpoint_0000_000004.pth.tar")
    assert allgather(stopped, "stopped") == [True] * comm.size()
    assert train(config).numbers["steps"] == 6


def test_error_is_raised_on_all_workers(folder):
    config = Config(data=f"{folder}/nowhere", out=f"{folder}/run", **OPTIONS)
    try:
        outcome = train(config).folder
    except RunError as error:
        outcome = str(error)
    [line] = set(allgather(outcome, "error"))
    assert "nowhere" in line and line != f"{folder}/run"
