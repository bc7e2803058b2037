"""What --deterministic sets before CUDA and NCCL start, and when it refuses."""

import os

import pytest
import torch

from job.cluster import deterministic, launch, task
from job.errors import RunError

ON, OFF = {"deterministic": True}, {"deterministic": False}
SET = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The variables are unset before and after, and CUDA has not started with them."""
    monkeypatch.setattr(deterministic, "started", False)
    for name in SET:
        monkeypatch.setenv(name, "")  # which restores it
        del os.environ[name]


@pytest.fixture(autouse=True)
def modes():
    mode = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(mode)


def found():
    return {name: os.environ[name] for name in SET if name in os.environ}


def test_the_variables_are_set_only_with_the_option():
    for options in (OFF, {}):
        deterministic.prepare(options)
        assert found() == {}
    deterministic.prepare(ON)
    assert found() == SET
    deterministic.prepare(ON)  # a script's second run


def test_the_smaller_workspace_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    deterministic.prepare(ON)
    assert found() == SET | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.parametrize(
    "name, value",
    [("NCCL_ALGO", "Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")],
)
def test_another_value_is_refused_in_one_line(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=f"{name}={value}: --deterministic expects") as error:
        deterministic.prepare(ON)
    assert "\n" not in str(error.value)
    deterministic.prepare(OFF)


def test_cuda_that_has_started_without_the_variables_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RunError, match="CUBLAS_WORKSPACE_CONFIG: CUDA has started without it"):
        deterministic.prepare(ON)
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    deterministic.prepare(ON)


@pytest.mark.parametrize("first, refused", [(ON, False), (OFF, True)])
def test_a_script_s_second_run_has_what_its_first_started_cuda_with(monkeypatch, first, refused):
    """The first run's end has restored the variables."""
    deterministic.prepare(first)
    deterministic.apply(first, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in found():
        del os.environ[name]
    if refused:
        with pytest.raises(RunError, match="CUDA has started without it"):
            deterministic.prepare(ON)
    else:
        deterministic.prepare(ON)
        assert found() == SET


@pytest.mark.parametrize(
    "options, device, on",
    [(ON, "cuda", True), (ON, "cpu", False), (OFF, "cuda", False)],
)
def test_torch_chooses_deterministic_algorithms_on_gpus_with_the_option(options, device, on):
    deterministic.apply(options, torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() == on
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_start_sets_the_variables_before_workers_connect_and_the_mode_on_its_device(monkeypatch):
    order = []
    own = launch.deterministic
    monkeypatch.setattr(own, "prepare", lambda options: order.append("prepare"))
    monkeypatch.setattr(own, "apply", lambda options, device: order.append(device.type))
    monkeypatch.setattr(task, "launched", lambda: order.append("launched") or ("none", 0, 1))
    launch.start(ON)
    assert order[0] == "prepare" and order.count("prepare") == 1 and order[-1] == "cpu"
