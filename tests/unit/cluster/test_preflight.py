"""The first log line of a run."""

import torch

from job import __version__
from job.cluster import preflight


def test_line_has_the_network_of_nccl():
    setting = preflight.setting(torch.device("cpu"))
    assert "; no network; device CPU " in preflight.line(setting | {"nccl": ""})
    assert f"; moco-mgd {__version__}, torch " in preflight.line(setting)
    assert "; no network, NCCL over IB; device CPU " in preflight.line(setting | {"nccl": "IB"})


def test_setting_has_interface_and_rendezvous(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth0")
    assert preflight.setting(torch.device("cpu"))["network"] == "interface eth0"
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "10.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "4711")
    setting = preflight.setting(torch.device("cpu"))
    assert setting["network"] == "interface eth0 rendezvous 10.0.0.1:4711"
