"""Each way to train, on the device: its losses are finite and its checkpoint is complete."""

import importlib.util
import math

import pytest
import torch

import collectives
from job.cli import checked
from job.cluster import comm
from job.config import Config
from job.distill import DISTILLERS
from job.frameworks import FRAMEWORKS
from job.train import train
from runs import of_kind

NONE, SIMSIAM = {"framework": "none"}, {"framework": "simsiam", "dim": 64, "pred_dim": 16}
ALONE = {"teacher": ""}
PATHS = {
    "moco": ALONE,
    "moco knn": ALONE | {"knn_every": 1, "knn_k": 5},
    "moco bf16": ALONE | {"precision": "bf16"},
    "moco device views": ALONE | {"augment_on": "device"},
    "moco accumulate": ALONE | {"accumulate": 2},
    "moco half gradients": ALONE | {"fp16_allreduce": True},
    "mgd": {},
    "mgd deterministic": {"deterministic": True},
    "gram deterministic": {"distill": ["gram"], "deterministic": True},
    "mgd bf16 device views": {"precision": "bf16", "augment_on": "device"},
    "mgd factor": {"loss_share": 0.0, "loss_factor": 1e4},
    "mgd rd": {"reducer": "rd"},
    "mgd sp": {"reducer": "sp"},
    "mgd sm": {"reducer": "sm"},
    "mgd random": {"matching": "random"},
    "mgd correction pooled": {"mgd_correction": True, "mgd_pooled": 1.0},
    "mgd gram": {"distill": ["mgd", "gram"]},
    "projector": {"distill": ["projector"]},
    "gram": {"distill": ["gram"]},
    "simreg": {"distill": ["simreg"]},
    "similarity headless": {"distill": ["similarity"]},
    "similarity seed": {"distill": ["similarity"], "similarity": "seed"},
    "similarity compress": {"distill": ["similarity"], "similarity": "compress"},
    "disco": {"distill": ["disco"]},
    "disco bf16": {"distill": ["disco"], "precision": "bf16"},
    "none simreg": NONE | {"distill": ["simreg"]},
    "none similarity bf16": NONE | {"distill": ["similarity"], "precision": "bf16"},
    "simsiam": SIMSIAM | ALONE,
    "simsiam bf16": SIMSIAM | ALONE | {"precision": "bf16"},
    "simsiam mgd": SIMSIAM,
    "timm": ALONE | {"arch": "timm/mobilenetv3_small_050", "width": 64},
    "compile": ALONE | {"compile": True},
    "compile bf16": {"compile": True, "precision": "bf16"},
}


# What comm.py's functions are called in collectives.USED.
NAMES = {"begin_sum_": "sum", "total": "total", "highest": "highest", "begin_gather": "gather"}
NAMES |= {"begin_exchange": "exchange", "broadcast": "broadcast", "broadcast_": "broadcast"}


@pytest.fixture
def sent(monkeypatch):
    """The collectives of the test, each with its dtype."""
    found = set()

    def watch(name, function):
        def watched(given, *arguments):
            tensors = given.values() if isinstance(given, dict) else [given]
            found.update((NAMES[name], tensor.dtype) for tensor in tensors)
            return function(given, *arguments)

        monkeypatch.setattr(comm, name, watched)

    for name in NAMES:
        watch(name, getattr(comm, name))
    return found


def steps(folder):
    return of_kind(folder, "step")


@pytest.mark.parametrize("name", PATHS)
def test_a_way_to_train_has_finite_losses(
    name,
    device,
    size,
    network,
    images,
    teacher,
    tmp_path,
    sent,
):
    changes = PATHS[name]
    if changes.get("compile") and device.type == "cpu":
        pytest.skip("takes minutes on a CPU; tests/runs/test_training.py has it")
    if name == "timm" and not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    width = int(network[network.index("--width") + 1])
    options = dict(data=str(images), teacher=str(teacher), out=str(tmp_path / "run"), epochs=1)
    options |= dict(arch="resnet18", width=width, image_size=size, mlp=True, aug_plus=True)
    options |= dict(batch_size=16, moco_k=64, workers=0, lr=0.01, warmup_epochs=0, schedule=[])
    options |= dict(similarity_k=32)
    run = train(checked(Config(**options | changes)))

    [start] = of_kind(tmp_path / "run", "start")
    on_gpu = not start["device"].startswith("CPU")
    assert on_gpu == (device.type == "cuda"), start["device"]
    found = steps(tmp_path / "run")
    assert len(found) == 50 // 16
    assert all(math.isfinite(record["loss"]) for record in found)
    state = torch.load(run.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    floats = [value for value in state.values() if value.is_floating_point()]
    assert floats and all(value.isfinite().all() for value in floats)
    used = {(name, dtype) for name, dtypes in collectives.USED.items() for dtype in dtypes}
    assert sent - used == set(), "test_collectives.py does not try these"


def test_each_framework_and_distiller_has_a_path():
    found = [Config(**{"teacher": "a.pth"} | changes) for changes in PATHS.values()]
    assert {config.framework for config in found} == FRAMEWORKS.keys()
    with_teacher = [config.distill for config in found if config.teacher]
    assert set().union(*with_teacher) == DISTILLERS.keys()
