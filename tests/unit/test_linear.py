"""Hits of a classifier."""

import pytest
import torch

from errors import refused
from job.config import LinearConfig, read_config
from job.declare import flag
from job.linear import hits, linear
from job.metrics.callbacks import Callback


def test_hits_are_counted_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.2, 0.1]])
    labels = torch.tensor([1, 2, -1])
    assert [int(hits(logits, labels, k)) for k in (1, 2, 5)] == [1, 2, 2]


LOGS = {"log_to": ["wandb"], "tensorboard": True}


@pytest.mark.parametrize("alone", ["knn", "evaluate"])
def test_an_accuracy_alone_has_no_records_for_callbacks(alone, tmp_path):
    """A file may serve several runs: there the options have no effect."""
    end = f"no effect with --{alone}, which writes no records; leave out one"
    argv = ["DIR", f"--{alone}"]
    program = ("job.linear", LinearConfig)
    assert refused(read_config, [*argv, "--log-to", "wandb"], *program) == f"--log-to: {end}"
    assert refused(read_config, [*argv, "--tensorboard"], *program) == f"--tensorboard: {end}"
    assert not read_config([*argv, "--no-tensorboard"], *program).tensorboard
    options = {"data": "DIR", alone: True}
    assert refused(linear, LinearConfig(**options), [Callback()]) == f"callbacks: {end}"
    for name, value in LOGS.items():
        assert refused(linear, LinearConfig(**options, **{name: value})) == f"{flag(name)}: {end}"
    file = tmp_path / "run.yaml"
    file.write_text("log_to: [wandb]\ntensorboard: true")
    found = read_config([*argv, "--config", str(file)], *program)
    assert {name: getattr(found, name) for name in LOGS} == LOGS


def test_neighbours_are_counted_only_in_k_nn():
    expected = "--knn-k 5: no effect without --knn; leave it out, or add --knn"
    assert refused(read_config, ["DIR", "--knn-k", "5"], "job.linear", LinearConfig) == expected
    line = ["DIR", "--knn", "--knn-k", "5"]
    assert read_config(line, "job.linear", LinearConfig).knn_k == 5
