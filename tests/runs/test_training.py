"""Options that make a step faster or smaller: the same results, to a stated tolerance."""

import json

import pytest
import torch

from runs import differences

SMALL = "-a resnet18 --image-size 32 --epochs 2 --moco-k 20 --mlp --moco-t 0.2".split()
SMALL += "--aug-plus --cos -j 0 --warmup-epochs 1 --save-every 2steps".split()
TEACHER = "--refresh-epochs 0,1 --teacher".split()  # the file follows
HALF = {"half": ["--fp16-allreduce"], "plain": []}
COMPILED = {"compiled": ["--compile"], "plain": []}


def run(start_job, workers, folder, *arguments):
    """Run a job to its end. Return it."""
    job = start_job(workers, folder, [*SMALL, *arguments])
    output = job.finish()
    assert job.process.returncode == 0, output
    return job


def curve(job, name="loss"):
    """Return a figure of each step."""
    records = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def test_micro_batches_train_like_workers(start_job, images, teacher_file, tmp_path):
    """Only the batch norms' running statistics differ. The second epoch's refresh reads them."""
    options = [images, "--batch-size", 16, *TEACHER, teacher_file]
    micro = run(start_job, 2, tmp_path / "micro", *options, "--accumulate", 2)
    workers = run(start_job, 4, tmp_path / "workers", *options)
    for name in ("contrastive", "distillation"):
        assert curve(micro, name)[:3] == pytest.approx(curve(workers, name)[:3], rel=1e-3)


def test_half_precision_gradients_keep_the_loss(start_job, images, tmp_path):
    """The run is the warm-up's first epoch.

    Gradients are rounded to 11 bits. At its low rates this changes a parameter by less than the
    parameter's own rounding.
    """
    options = [images, "--batch-size", 16]
    half, plain = (
        run(start_job, 2, tmp_path / name, *options, *more) for name, more in HALF.items()
    )
    assert curve(half)[:3] == pytest.approx(curve(plain)[:3], rel=1e-4)
    assert differences(half.folder, plain.folder) != []


def test_killed_run_resumes_to_the_same_bytes(start_job, images, teacher_file, tmp_path):
    """The run has micro-batches and half-precision gradients."""
    options = [images, "--batch-size", 16, *TEACHER, teacher_file]
    options += ["--accumulate", 2, "--fp16-allreduce"]
    reference = run(start_job, 2, tmp_path / "reference", *options)
    killed = start_job(2, tmp_path / "run", [*SMALL, *options])
    killed.wait_for_step(3)
    killed.kill()
    resumed = run(start_job, 2, tmp_path / "run", *options, "--resume", "auto")
    assert resumed.steps() == list(range(1, 7))
    assert differences(reference.folder, resumed.folder) == []


def test_compiled_networks_give_the_same_losses(start_job, images, tmp_path):
    """They differ by rounding only. The names in checkpoints do not change."""
    options = [images, "--batch-size", 16, "--epochs", 1]
    compiled, plain = (
        run(start_job, 1, tmp_path / name, *options, *more) for name, more in COMPILED.items()
    )
    assert curve(compiled) == pytest.approx(curve(plain), rel=1e-3)
    saved, expected = (
        torch.load(job.folder / "last.pth.tar", weights_only=True)["state_dict"]
        for job in (compiled, plain)
    )
    assert saved.keys() == expected.keys()
