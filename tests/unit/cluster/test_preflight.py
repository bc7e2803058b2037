"""The first log line of a run."""

import torch

from job import __version__
from job.cluster import preflight


def test_line_has_the_network_of_nccl():
    setting = preflight.setting(torch.device("cpu"))
    assert preflight.line(setting).startswith("1 worker on ")
    assert ", no launcher; device CPU " in preflight.line(setting)
    assert preflight.line(setting).endswith("; no container")
    assert preflight.line(setting | {"container": "moco-mgd"}).endswith("; image moco-mgd")
    assert preflight.line(setting | {"workers": 2}).startswith("2 workers on ")
    assert ", launcher srun; " in preflight.line(setting | {"launcher": "srun"})
    assert ", no launcher; device CPU " in preflight.line(setting | {"nccl": ""})
    gloo = {"network": "interface eth0", "nccl": "IB"}
    assert "; interface eth0, NCCL over IB; device CPU " in preflight.line(setting | gloo)
    assert f"; moco-mgd {__version__}, torch " in preflight.line(setting)
    assert "; NCCL over IB; device CPU " in preflight.line(setting | {"nccl": "IB"})


def test_setting_has_interface_and_rendezvous(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth0")
    assert preflight.setting(torch.device("cpu"))["network"] == "interface eth0"
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "10.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "4711")
    setting = preflight.setting(torch.device("cpu"))
    assert setting["network"] == "interface eth0, rendezvous 10.0.0.1:4711"
