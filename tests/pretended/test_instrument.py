"""The pretended GPU and Horovod: they report errors of CUDA and NCCL, and count stalls."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretended_gpu import CUDA, Pretended


def on_gpu(*shape):
    return torch.arange(float(torch.Size(shape).numel()), device="cuda").view(shape)


STALLS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "not pinned": lambda x: torch.ones(2).to(CUDA, non_blocking=True),
    "blocking": lambda x: torch.ones(2).pin_memory().to(CUDA),
    "copy_": lambda x: x.copy_(torch.ones(2, 3)),
    "tensor": lambda x: torch.tensor([1.0], device=CUDA),
    "index of the CPU": lambda x: x[torch.tensor([0, 1])],
    "list as index": lambda x: x[[0, 1]],
    "mask": lambda x: x[x > 2],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
}
FREE = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "pinned": lambda x: torch.ones(2).pin_memory().to(CUDA, non_blocking=True),
    "row of pinned memory": lambda x: torch.ones(2, 3).pin_memory()[1].to(CUDA, non_blocking=True),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
    "slice": lambda x: x[:, 1:],
    "number of the CPU": lambda x: x * torch.tensor(2.0),
    "generator": lambda x: torch.rand(2, device=CUDA, generator=torch.Generator(CUDA)),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "same device": lambda x: x.to("cuda"),
}
REFUSED = {
    "two devices": lambda x: x + torch.ones(2, 3),
    "two devices in a list": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "two devices in place": lambda x: x.add_(torch.ones(2, 3)),
    "integer product": lambda x: x.long() @ x.long().T,
    "resized bytes": lambda x: F.interpolate(
        x.byte()[None, None], (4, 4), mode="bilinear", antialias=True
    ),
    "generator of the CPU": lambda x: torch.rand(2, device="cuda", generator=torch.Generator()),
    "index of the GPU": lambda x: torch.ones(3)[torch.zeros(2, dtype=torch.long, device="cuda")],
}


@pytest.mark.parametrize("name", STALLS)
def test_waits_for_the_device_are_stalls(gpu, name):
    x = on_gpu(2, 3)
    gpu.clear()
    STALLS[name](x)
    assert gpu.copies.total() == 1 and not gpu.problems, gpu.copies


@pytest.mark.parametrize("name", FREE)
def test_asynchronous_work_is_not_a_stall(gpu, name):
    x = on_gpu(2, 3)
    gpu.clear()
    FREE[name](x)
    assert not gpu.copies and not gpu.problems


@pytest.mark.parametrize("name", REFUSED)
def test_problems_of_cuda_are_found(gpu, name):
    REFUSED[name](on_gpu(2, 3))
    assert len(gpu.problems) == 1


def test_numpy_refuses_tensors_of_the_device(gpu):
    with pytest.raises(TypeError, match="cuda:0"):
        on_gpu(2).numpy()


def test_results_equal_the_cpu_s(gpu):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    images, nets = torch.randn(5, 3, 4, 4), [net, copy.deepcopy(net).to(CUDA)]
    losses = [
        each(x).square().sum() for each, x in zip(nets, [images, images.to(CUDA)], strict=True)
    ]
    for each, loss in zip(nets, losses, strict=True):
        loss.backward()
        torch.optim.SGD(each.parameters(), 0.1, momentum=0.9, fused=True).step()
    assert losses[1].device == CUDA and losses[0].item() == losses[1].item()
    for mine, other in zip(*(each.parameters() for each in nets), strict=True):
        assert isinstance(other, Pretended) and isinstance(other, nn.Parameter)
        assert other.grad.device == CUDA
        assert torch.equal(mine.grad, other.grad.cpu()) and torch.equal(mine, other.cpu())
    assert not gpu.problems


COLLECTIVES = {
    "bf16": (lambda hvd, x: hvd.allreduce_async(x.bfloat16(), hvd.Sum, "one"), 1),
    "bool": (lambda hvd, x: hvd.allgather_async(x > 0, "one"), 1),
    "bytes summed": (lambda hvd, x: hvd.allreduce_async(x.byte(), hvd.Sum, "one"), 1),
    "not contiguous": (lambda hvd, x: hvd.allreduce_async_(x.T, hvd.Sum, "one"), 1),
    "no name": (lambda hvd, x: hvd.allgather_async(x, None), 1),
    "bytes gathered": (lambda hvd, x: hvd.allgather_async(x.byte(), "one"), 0),
    "sums": (lambda hvd, x: hvd.allreduce_async_(x.double(), hvd.Sum, "one"), 0),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_problems_of_nccl_are_found(gpu, horovod, name):
    begin, problems = COLLECTIVES[name]
    begin(horovod, on_gpu(2, 3))
    assert len(gpu.problems) == problems


@pytest.mark.parametrize(
    ("device", "in_stream", "stalls"), [("cuda", "0", 1), ("cuda", "1", 0), ("cpu", "1", 1)]
)
def test_waits_for_collectives_are_counted(gpu, horovod, monkeypatch, device, in_stream, stalls):
    monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", in_stream)
    horovod.synchronize(horovod.allreduce_async(torch.ones(2, device=device), horovod.Sum, "one"))
    assert gpu.waits.total() == stalls


def test_repeated_name_is_a_problem(gpu, horovod):
    for _ in range(2):
        horovod.allgather_async(on_gpu(2), "one")
    assert len(gpu.problems) == 1
