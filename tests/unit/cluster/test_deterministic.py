"""--deterministic: its variables and modes, and its errors."""

import os

import pytest
import torch

from job.cluster import deterministic, launch, task
from job.errors import RunError

ON, OFF = {"deterministic": True}, {"deterministic": False}
SET = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Unset the variables before and after a test, in which CUDA has not started with them."""
    monkeypatch.setattr(deterministic, "started", False)
    for name in SET:
        monkeypatch.setenv(name, "")  # restores it at the end
        del os.environ[name]


@pytest.fixture(autouse=True)
def modes():
    mode = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(mode)


def variables_set():
    return {name: os.environ[name] for name in SET if name in os.environ}


def test_prepare_sets_variables_only_with_the_option():
    for options in (OFF, {}):
        deterministic.prepare(options)
        assert variables_set() == {}
    deterministic.prepare(ON)
    assert variables_set() == SET
    deterministic.prepare(ON)  # a script's second run


def test_prepare_keeps_the_smaller_workspace(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    deterministic.prepare(ON)
    assert variables_set() == SET | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.parametrize(
    "name, value",
    [("NCCL_ALGO", "Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")],
)
def test_prepare_refuses_other_values(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=f"{name}={value}: --deterministic expects") as error:
        deterministic.prepare(ON)
    assert "\n" not in str(error.value)
    deterministic.prepare(OFF)


def test_prepare_refuses_a_started_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RunError, match="CUBLAS_WORKSPACE_CONFIG: CUDA has started without it"):
        deterministic.prepare(ON)
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    deterministic.prepare(ON)


@pytest.mark.parametrize("first, refused", [(ON, False), (OFF, True)])
def test_second_run_needs_the_option_in_the_first(monkeypatch, first, refused):
    """The end of the first run has restored the variables."""
    deterministic.prepare(first)
    deterministic.apply(first, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in variables_set():
        del os.environ[name]
    if refused:
        with pytest.raises(RunError, match="CUDA has started without it"):
            deterministic.prepare(ON)
    else:
        deterministic.prepare(ON)
        assert variables_set() == SET


@pytest.mark.parametrize(
    "options, device, on",
    [(ON, "cuda", True), (ON, "cpu", False), (OFF, "cuda", False)],
)
def test_apply_sets_torch_s_mode_on_gpus(options, device, on):
    deterministic.apply(options, torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() == on
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_start_sets_variables_before_workers_connect(monkeypatch):
    order = []
    own = launch.deterministic
    monkeypatch.setattr(own, "prepare", lambda options: order.append("prepare"))
    monkeypatch.setattr(own, "apply", lambda options, device: order.append(device.type))
    monkeypatch.setattr(task, "launched", lambda: order.append("launched") or ("none", 0, 1))
    launch.start(ON)
    assert order[0] == "prepare" and order.count("prepare") == 1 and order[-1] == "cpu"
