"""job.linear: hits, and options without an effect."""

import pytest
import torch

from errors import refused
from job.config import LinearConfig, read_config
from job.declare import flag
from job.linear import hits, linear
from job.metrics.callbacks import Callback


def test_hits_count_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.2, 0.1]])
    labels = torch.tensor([1, 2, -1])
    assert [int(hits(logits, labels, k)) for k in (1, 2, 5)] == [1, 2, 2]


LOGS = {"log_to": ["wandb"], "tensorboard": True}


@pytest.mark.parametrize("mode", ["knn", "evaluate"])
def test_accuracy_only_refuses_callbacks(mode, tmp_path):
    """In a file, which several runs can use, the options have no effect instead."""
    end = f"no effect with --{mode}, which writes no records; leave out one"
    argv = ["DIR", f"--{mode}"]
    program = ("job.linear", LinearConfig)
    assert refused(read_config, [*argv, "--log-to", "wandb"], *program) == f"--log-to: {end}"
    assert refused(read_config, [*argv, "--tensorboard"], *program) == f"--tensorboard: {end}"
    assert not read_config([*argv, "--no-tensorboard"], *program).tensorboard
    options = {"data": "DIR", mode: True}
    assert refused(linear, LinearConfig(**options), [Callback()]) == f"callbacks: {end}"
    for name, value in LOGS.items():
        assert refused(linear, LinearConfig(**options, **{name: value})) == f"{flag(name)}: {end}"
    file = tmp_path / "run.yaml"
    file.write_text("log_to: [wandb]\ntensorboard: true")
    config = read_config([*argv, "--config", str(file)], *program)
    assert {name: getattr(config, name) for name in LOGS} == LOGS


def test_knn_k_needs_knn():
    expected = "--knn-k 5: no effect without --knn; leave it out, or add --knn"
    assert refused(read_config, ["DIR", "--knn-k", "5"], "job.linear", LinearConfig) == expected
    line = ["DIR", "--knn", "--knn-k", "5"]
    assert read_config(line, "job.linear", LinearConfig).knn_k == 5
