"""Each path of training on the device: finite losses and a complete checkpoint."""

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
NO_TEACHER = {"teacher": ""}
PATHS = {
    "moco": NO_TEACHER,
    "moco knn": NO_TEACHER | {"knn_every": 1, "knn_k": 5},
    "moco bf16": NO_TEACHER | {"precision": "bf16"},
    "moco device views": NO_TEACHER | {"augment_on": "device"},
    "moco accumulate": NO_TEACHER | {"accumulate": 2},
    "moco half gradients": NO_TEACHER | {"fp16_allreduce": True},
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
    "simsiam": SIMSIAM | NO_TEACHER,
    "simsiam bf16": SIMSIAM | NO_TEACHER | {"precision": "bf16"},
    "simsiam mgd": SIMSIAM,
    "timm": NO_TEACHER | {"arch": "timm/mobilenetv3_small_050", "width": 64},
    "compile": NO_TEACHER | {"compile": True},
    "compile bf16": {"compile": True, "precision": "bf16"},
}


# The names in collectives.USED of comm.py's functions.
NAMES = {"begin_sum_": "sum", "total": "total", "highest": "highest", "begin_gather": "gather"}
NAMES |= {"begin_exchange": "exchange", "broadcast": "broadcast", "broadcast_": "broadcast"}


@pytest.fixture
def sent(monkeypatch):
    """The pairs (collective, dtype) that a test uses."""
    used = set()

    def watch(name, function):
        def watched(given, *arguments):
            tensors = given.values() if isinstance(given, dict) else [given]
            used.update((NAMES[name], tensor.dtype) for tensor in tensors)
            return function(given, *arguments)

        monkeypatch.setattr(comm, name, watched)

    for name in NAMES:
        watch(name, getattr(comm, name))
    return used


def steps(folder):
    return of_kind(folder, "step")


@pytest.mark.parametrize("name", PATHS)
def test_path_has_finite_losses(
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
        pytest.skip("needs minutes on a CPU: tests/runs/test_training.py tests it")
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
    records = steps(tmp_path / "run")
    assert len(records) == 50 // 16
    assert all(math.isfinite(record["loss"]) for record in records)
    state = torch.load(run.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    floats = [value for value in state.values() if value.is_floating_point()]
    assert floats and all(value.isfinite().all() for value in floats)
    tested = {(name, dtype) for name, dtypes in collectives.USED.items() for dtype in dtypes}
    assert sent - tested == set(), "test_collectives.py does not test these"


def test_paths_have_each_method():
    configs = [Config(**{"teacher": "a.pth"} | changes) for changes in PATHS.values()]
    assert {config.framework for config in configs} == FRAMEWORKS.keys()
    with_teacher = [config.distill for config in configs if config.teacher]
    assert set().union(*with_teacher) == DISTILLERS.keys()
