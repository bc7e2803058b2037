"""SimSiam with synchronised batch norm on N workers, against one process with the total batch."""

import hashlib
import time

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from job.cluster import comm
from job.cluster.objects import allgather
from job.config import Config
from job.engine import replicas, statistics
from job.engine.gradients import Gradients
from job.engine.sync_norm import SynchronisedNorm
from job.frameworks.base import MicroBatch
from job.frameworks.simsiam import SimSiamFramework
from job.position import START

B = 4
SMALL = dict(framework="simsiam", arch="resnet18", stem="small", width=16, dim=24, pred_dim=8)


def build(**options):
    """Build SimSiam in float64, in which rounding turns no ReLU on or off."""
    torch.manual_seed(0)
    framework = SimSiamFramework(Config(**SMALL, **options), [3, 4])
    framework.module.double()
    for norm in framework.module.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            nn.init.normal_(norm.bias, 0.0, 0.3)
    return framework


def views():
    """Return the total batch's two views, (2, NB, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, comm.size() * B, 3, 16, 16, generator=generator, dtype=torch.float64)


def own(batch):
    """Return this worker's images of a total batch (NB, ...)."""
    return batch[comm.rank() * B : (comm.rank() + 1) * B]


def step(framework, first, second):
    """Return the output of a forward and backward pass."""
    output = framework.forward(MicroBatch(first, START, 0, 0, (second,)), None)
    output.losses["cosine"].backward()
    return output


def trained(framework):
    return [pair for pair in framework.module.named_parameters() if pair[1].requires_grad]


@pytest.fixture(scope="module")
def passes():
    """A pass of the workers, with averaged gradients, and a pass of one process."""
    framework, first, second = build(), *views()
    gradients = Gradients(trained(framework))
    gradients.clear()
    output = step(framework, own(first), own(second))
    gradients.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "size", lambda: 1)
        single = build()
    assert not any(isinstance(module, SynchronisedNorm) for module in single.module.modules())
    return framework, output, single, step(single, first, second)


def largest(result, expected):
    """Return the largest difference on any worker, over the largest value or 0.01."""
    error = ((result - expected).abs().max() / expected.abs().max().clamp_min(0.01)).item()
    return max(allgather(error, "errors"))


def test_losses_and_outputs_equal_one_process_s(passes):
    _, output, _, expected = passes
    loss = comm.total(output.losses["cosine"].detach(), "loss") / comm.size()
    assert largest(loss, expected.losses["cosine"].detach()) < 1e-5
    assert largest(output.embeddings, own(expected.embeddings)) < 1e-5
    for view in (0, 1):
        maps, others = ((each.features, *each.others)[view] for each in (output, expected))
        assert list(maps) == list(others) == ["layer3", "layer4", "fc"]
        for name in maps:
            assert largest(maps[name].detach(), own(others[name]).detach()) < 1e-5


def test_gradients_equal_one_process_s(passes):
    framework, _, single, _ = passes
    expected = dict(trained(single))
    scale = max(value.grad.abs().max().item() for value in expected.values())
    errors = [(value.grad - expected[name].grad).abs().max() for name, value in trained(framework)]
    assert scale > 0
    assert max(allgather(max(errors).item(), "gradients")) < 1e-5 * scale


def test_running_statistics_equal_one_process_s(passes):
    framework, _, single, _ = passes
    expected = single.module.state_dict()
    for name, value in framework.module.state_dict().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert largest(value.double(), expected[name].double()) < 1e-5, name
    replicas.check(replicas.shared(framework.module), "after a step")


def digest(value):
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


def test_sync_bn_heads_synchronises_only_the_heads():
    """The other norms' statistics differ between workers until an epoch's end."""
    framework = build(sync_bn="heads")
    step(framework, *map(own, views()))
    state = framework.module.state_dict()
    norms = [name for name in state if name.endswith("running_mean")]
    digests = allgather({name: digest(state[name]) for name in norms}, "digests")
    shared = {name for name in norms if len({worker[name] for worker in digests}) == 1}
    heads = {name for name in norms if ".fc." in name or "predictor" in name}
    assert len(heads) == 4 and shared == (heads if comm.size() > 1 else set(norms))
    before = {name: state[name].clone() for name in heads}
    statistics.average(framework.module)
    after = framework.module.state_dict()
    assert all(allgather(all(torch.equal(after[name], before[name]) for name in heads), "kept"))
    means = allgather(after["encoder.bn1.running_mean"].tolist(), "averaged")
    assert all(mean == means[0] for mean in means)


def train(delay):
    """Return the digests of the state after three steps, with a pause of `delay` s a stage."""
    framework = build()
    named = trained(framework)
    sgd = torch.optim.SGD([value for _, value in named], lr=0.1, momentum=0.9)
    gradients = Gradients(named)
    for stage in (3, 4):
        weight = framework.module.get_parameter(f"encoder.layer{stage}.0.bn1.weight")
        weight.register_hook(lambda _: time.sleep(delay))
    for _ in range(3):
        gradients.clear()
        step(framework, *map(own, views()))
        gradients.wait()
        sgd.step()
    return {name: digest(value) for name, value in framework.module.state_dict().items()}


def test_bytes_do_not_depend_on_timing():
    """All workers have the same bytes."""
    results = [train(delay) for delay in (0.0, 0.02 * ((comm.rank() * 3) % 4))]
    for worker in allgather(results, "digests"):
        assert worker == [results[0], results[0]]
