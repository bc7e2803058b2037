"""Training, measuring, saving and resuming on a GPU that is only pretended.

No operation mixes devices or has a dtype that CUDA or NCCL refuses. In a step the host waits for the
device once, to read the sums of the losses, and for no collective.
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

COPIES, WAITS = 1, 0  # that block the host in a step
DISTILLED = dict(similarity_k=20, head_width=16, mgd_images=32, loss_share=1.0)
MATCHED = {"distill": ["mgd"], "mgd_correction": True, "mgd_pooled": 1.0, "reducer": "rd"}
CASES = {
    "moco": {"distill": [*DISTILLERS], "similarity": "compress"},
    "simsiam": {"framework": "simsiam", "distill": ["mgd"]},
    "none": {"framework": "none", "distill": ["similarity", "disco"], "similarity": "seed"},
    "alone": {"augment_on": "device", "aug_plus": True},
    "parts in half precision": {**MATCHED, "accumulate": 2, "fp16_allreduce": True},
}


def check(gpu, steps):
    """Nothing is refused, and the second of three steps does not stall too often."""
    assert not gpu.problems
    _, _, (copies, waits) = steps
    assert copies.total() <= COPIES, copies
    assert waits.total() <= WAITS, waits


def test_each_framework_and_distiller_is_tried():
    assert {case.get("framework", "moco") for case in CASES.values()} == {*FRAMEWORKS}
    assert set(CASES["moco"]["distill"]) == {*DISTILLERS}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_mixes_no_devices_and_seldom_waits(gpu, steps, run, narrow_teacher, case):
    options = CASES[case]
    taught = DISTILLED | {"teacher": narrow_teacher} if "distill" in options else {}
    run(**taught, **options)
    check(gpu, steps)


@pytest.mark.slow
def test_synchronised_norms_mix_no_devices_and_do_not_wait(gpu, steps, run, horovod, monkeypatch):
    """A single worker does not synchronise them: here they see two."""
    monkeypatch.setattr(sync_norm, "comm", SimpleNamespace(size=lambda: 2, total=comm.total))
    run(framework="simsiam")
    begun = {name for name in horovod.begun if name.startswith("norm.")}
    assert begun and {f"{name.removesuffix('.backward')}.backward" for name in begun} <= begun
    check(gpu, steps)


@pytest.mark.slow
def test_a_pretended_gpu_computes_what_the_cpu_does(horovod, run):
    """To rounding: its networks are channels last."""
    with pretended() as gpu:
        on_gpu = of_kind(run("gpu"), "step")
    on_cpu = of_kind(run("cpu"), "step")
    assert not gpu.problems and len(on_gpu) == len(on_cpu) == 3
    for name in ("loss", "contrastive", "gradient_norm"):
        assert [step[name] for step in on_gpu] == pytest.approx(
            [step[name] for step in on_cpu], rel=1e-2
        )


@pytest.mark.slow
def test_networks_are_channels_last_and_so_are_their_gradients(
    gpu, steps, run, training, narrow_teacher
):
    """In bf16 the teacher is stored so, and the student is not. Checkpoints are contiguous."""
    folder = run(teacher=narrow_teacher, **DISTILLED, distill=["mgd", "disco"], precision="bf16")
    check(gpu, steps)
    [made] = training
    convolutions = [
        each for each in made.framework.module.modules() if isinstance(each, torch.nn.Conv2d)
    ]
    assert len(convolutions) == 2 * 20  # of student and key encoder
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
def test_a_run_is_measured_saved_and_resumed_there(gpu, run, narrow_teacher):
    """A refresh, a factor, an accuracy and comparisons of workers; then the same bytes after a resume."""
    options = dict(teacher=narrow_teacher, **DISTILLED)
    options |= dict(knn_every=1, check_every=2, save_every="2steps")
    whole = run("whole", **options)
    for kind, number in {"refresh": 4, "factor": 1, "knn": 1, "collapse": 2}.items():
        assert len(of_kind(whole, kind)) == number, kind
    resumed = run("resumed", resume=str(whole / "checkpoint_0000_000002.pth.tar"), **options)
    assert differences(whole, resumed) == []
    assert not gpu.problems


@pytest.mark.slow
@pytest.mark.parametrize("lars", [False, True])
def test_a_classifier_is_trained_there(gpu, steps, images, tmp_path, lars):
    options = dict(
        data=str(images),
        batch_size=16,
        workers=0,
        arch="resnet18",
        stem="small",
        width=16,
        image_size=16,
    )
    found = linear(
        LinearConfig(
            out=str(tmp_path / "linear"), epochs=1, schedule=[], lars=lars, lr=0.1, **options
        )
    )
    assert 0 <= found.numbers["val_top1"] <= 100
    check(gpu, steps)


def test_neighbours_are_found_there(gpu, images):
    options = dict(
        data=str(images), workers=0, arch="resnet18", stem="small", width=16, image_size=16
    )
    assert linear(LinearConfig(knn=True, **options)).numbers["knn_images"] == 9
    assert not gpu.problems


def test_workers_are_compared_at_the_start(gpu, horovod, monkeypatch):
    monkeypatch.setattr(comm, "size", lambda: 2)  # a single worker is not compared
    same_start.check({"lr": 0.1}, "node", on_cpu=False)
    assert horovod.begun and not gpu.problems
