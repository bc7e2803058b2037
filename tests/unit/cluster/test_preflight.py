import torch

from job import __version__
from job.cluster import preflight


def test_the_first_line_has_nccl_s_network():
    found = preflight.setting(torch.device("cpu"))
    assert "; no network; device CPU " in preflight.line(found | {"nccl": ""})
    assert f"; moco-mgd {__version__}, torch " in preflight.line(found)
    assert "; no network, NCCL over IB; device CPU " in preflight.line(found | {"nccl": "IB"})


def test_the_first_line_has_the_interface_and_the_rendezvous(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth0")
    assert preflight.setting(torch.device("cpu"))["network"] == "interface eth0"
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "10.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "4711")
    found = preflight.setting(torch.device("cpu"))
    assert found["network"] == "interface eth0 rendezvous 10.0.0.1:4711"
