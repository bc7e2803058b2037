"""The options that make a step faster or smaller: what they compute is what is computed without them, to a stated tolerance."""

import json

import pytest
import torch

from runs import differences

SMALL = "-a resnet18 --image-size 32 --epochs 2 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos -j 0".split()
SMALL += "--warmup-epochs 1 --save-every 2steps".split()
TEACHER = "--refresh-epochs 0,1 --teacher".split()  # before the file


def run(start_job, workers, folder, *arguments):
    """The job of a run to its end."""
    job = start_job(workers, folder, [*SMALL, *arguments])
    output = job.finish()
    assert job.process.returncode == 0, output
    return job


def curve(job, name="loss"):
    """A figure of each step."""
    records = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def test_parts_of_a_batch_train_as_workers_of_their_own_would(
    start_job, images, teacher_file, tmp_path
):
    """What differs are the batch norms' running statistics, which only the refresh of the second epoch reads."""
    options = [images, "--batch-size", 16, *TEACHER, teacher_file]
    parts = run(start_job, 2, tmp_path / "parts", *options, "--accumulate", 2)
    workers = run(start_job, 4, tmp_path / "workers", *options)
    for name in ("contrastive", "distillation"):
        assert curve(parts, name)[:3] == pytest.approx(curve(workers, name)[:3], rel=1e-3)


def test_gradients_of_half_precision_leave_the_loss_as_it_is_for_a_while(
    start_job, images, tmp_path
):
    """Rounded to 11 bits; at the rates of the warm-up's first epoch that moves a parameter by less than its own rounding."""
    options = [images, "--batch-size", 16]
    half, plain = (
        run(start_job, 2, tmp_path / name, *options, *more) for name, more in HALF.items()
    )
    assert curve(half)[:3] == pytest.approx(curve(plain)[:3], rel=1e-4)
    assert differences(half.folder, plain.folder) != []


HALF = {"half": ["--fp16-allreduce"], "plain": []}


def test_a_killed_run_of_parts_and_half_precision_resumes_to_the_same_bytes(
    start_job, images, teacher_file, tmp_path
):
    options = [images, "--batch-size", 16, *TEACHER, teacher_file]
    options += ["--accumulate", 2, "--fp16-allreduce"]
    undisturbed = run(start_job, 2, tmp_path / "undisturbed", *options)
    killed = start_job(2, tmp_path / "run", [*SMALL, *options])
    killed.wait_for_step(3)
    killed.kill()
    again = run(start_job, 2, tmp_path / "run", *options, "--resume", "auto")
    assert again.steps() == list(range(1, 7))
    assert differences(undisturbed.folder, again.folder) == []


def test_compiled_networks_give_the_same_losses(start_job, images, tmp_path):
    """They round in other places; checkpoints keep their names."""
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


COMPILED = {"compiled": ["--compile"], "plain": []}
