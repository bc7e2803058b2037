"""Training, evaluation, saving and resuming on a pretended GPU.

No operation mixes devices or has a dtype that CUDA or NCCL refuses. In a step the host waits for
the device once, to read the sums of the losses, and for no collective.
"""

from types import SimpleNamespace

import pytest
import torch

from job.cluster import comm, same_start
from job.config import LinearConfig
from job.distill import DISTILLERS
from job.engine import sync_norm
from job.frameworks import FRAMEWORKS
from job.linear import linear
from pretended_gpu import pretended
from runs import differences, of_kind

COPIES, WAITS = 1, 0  # at most, in a step
SMALL = dict(arch="resnet18", stem="small", width=16, image_size=16, workers=0)
DISTILLED = dict(similarity_k=20, head_width=16, mgd_images=32, loss_share=1.0)
MATCHED = {"distill": ["mgd"], "mgd_correction": True, "mgd_pooled": 1.0, "reducer": "rd"}
CASES = {
    "moco": {"distill": [*DISTILLERS], "similarity": "compress"},
    "simsiam": {"framework": "simsiam", "distill": ["mgd"]},
    "none": {"framework": "none", "distill": ["similarity", "disco"], "similarity": "seed"},
    "no teacher": {"augment_on": "device", "aug_plus": True},
    "half precision": {**MATCHED, "accumulate": 2, "fp16_allreduce": True},
}


def check(gpu, steps):
    """Check that there are no problems, and few stalls in the second of three steps."""
    assert not gpu.problems
    _, _, (copies, waits) = steps
    assert copies.total() <= COPIES, copies
    assert waits.total() <= WAITS, waits


def test_cases_have_each_method():
    assert {case.get("framework", "moco") for case in CASES.values()} == {*FRAMEWORKS}
    assert set(CASES["moco"]["distill"]) == {*DISTILLERS}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_mixes_no_devices_and_rarely_waits(gpu, steps, run, narrow_teacher, case):
    options = CASES[case]
    teacher = DISTILLED | {"teacher": narrow_teacher} if "distill" in options else {}
    run(**teacher, **options)
    check(gpu, steps)


@pytest.mark.slow
def test_sync_norms_mix_no_devices_and_do_not_wait(gpu, steps, run, horovod, monkeypatch):
    """One worker does not synchronise them, so they read a size of two workers."""
    monkeypatch.setattr(sync_norm, "comm", SimpleNamespace(size=lambda: 2, total=comm.total))
    run(framework="simsiam")
    names = {name for name in horovod.names if name.startswith("norm.")}
    assert names and {f"{name.removesuffix('.backward')}.backward" for name in names} <= names
    check(gpu, steps)


@pytest.mark.slow
@pytest.mark.short
def test_losses_equal_the_cpu_s(horovod, run):
    """Rounding may differ between the two paths."""
    with pretended() as gpu:
        on_gpu = of_kind(run("gpu"), "step")
    on_cpu = of_kind(run("cpu"), "step")
    assert not gpu.problems and len(on_gpu) == len(on_cpu) == 3
    for name in ("loss", "contrastive", "gradient_norm"):
        assert [step[name] for step in on_gpu] == pytest.approx(
            [step[name] for step in on_cpu], rel=1e-2
        )


@pytest.mark.slow
def test_networks_and_gradients_are_channels_last(gpu, steps, run, training, narrow_teacher):
    """With bf16 only the teacher is stored in bf16. Checkpoints are contiguous."""
    folder = run(teacher=narrow_teacher, **DISTILLED, distill=["mgd", "disco"], precision="bf16")
    check(gpu, steps)
    [made] = training
    convolutions = [
        each for each in made.framework.module.modules() if isinstance(each, torch.nn.Conv2d)
    ]
    assert len(convolutions) == 2 * 20  # student and key encoder
    for each in convolutions:
        assert each.weight.is_contiguous(memory_format=torch.channels_last)
    views = {
        value: view for bucket in made.gradients.buckets for value, view in bucket.views.items()
    }
    assert all(view.stride() == value.stride() for value, view in views.items())
    assert {value.dtype for value in made.framework.module.parameters()} == {torch.float32}
    teacher = made.distillation.networks.teacher.net
    kinds = {each.weight.dtype for each in teacher.modules() if hasattr(each, "weight")}
    assert kinds == {torch.bfloat16}
    saved = torch.load(folder / "last.pth.tar", weights_only=True)
    momenta = [each["momentum_buffer"] for each in saved["optimizer"]["state"].values()]
    assert all(each.is_contiguous() for each in [*saved["state_dict"].values(), *momenta])


@pytest.mark.slow
@pytest.mark.short
def test_run_is_measured_saved_and_resumed(gpu, run, narrow_teacher):
    """With a refresh, a factor, k-NN and worker checks, a resume ends in the same bytes."""
    options = dict(teacher=narrow_teacher, **DISTILLED)
    options |= dict(knn_every=1, check_every=2, save_every="2steps")
    once = run("once", **options)
    for kind, number in {"refresh": 4, "factor": 1, "knn": 1, "collapse": 2}.items():
        assert len(of_kind(once, kind)) == number, kind
    resumed = run("resumed", resume=str(once / "checkpoint_0000_000002.pth.tar"), **options)
    assert differences(once, resumed) == []
    assert not gpu.problems


@pytest.mark.slow
@pytest.mark.parametrize("lars", [False, True])
def test_linear_trains(gpu, steps, images, tmp_path, lars):
    options = dict(data=str(images), out=str(tmp_path / "linear"), batch_size=16, epochs=1, **SMALL)
    result = linear(LinearConfig(**options, schedule=[], lars=lars, lr=0.1))
    assert 0 <= result.numbers["val_top1"] <= 100
    check(gpu, steps)


def test_knn_runs(gpu, images):
    options = dict(data=str(images), knn=True, **SMALL)
    assert linear(LinearConfig(**options)).numbers["knn_images"] == 9
    assert not gpu.problems


def test_same_start_compares_workers(gpu, horovod, monkeypatch):
    monkeypatch.setattr(comm, "size", lambda: 2)  # one worker is not compared
    same_start.check({"lr": 0.1}, "node", on_cpu=False)
    assert horovod.names and not gpu.problems
