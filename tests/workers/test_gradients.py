"""A step of the program on N workers against one worker with the total batch.

Batch norm is in eval mode, so that both are equal. NB: images of the total batch.
"""

import pytest
import torch
import torch.nn.functional as F

from job.cluster import comm
from job.cluster.objects import allgather
from job.data.augment import normalize
from steps import build_training, save_teacher, train

B, K, DIM, T = 4, 32, 16, 0.2
STAGES = [1, 2, 3, 4]
FACTOR = 200.0  # distillation and contrastive gradients have similar sizes


@pytest.fixture
def training(run, tmp_path):
    """A training with a teacher, in eval mode, with a constant key encoder (momentum 1)."""
    teacher = tmp_path / "teacher.pth"
    if comm.rank() == 0:
        save_teacher(teacher)
    options = {"moco_dim": DIM, "moco_k": K, "moco_m": 1.0, "moco_t": T}
    options |= {"mgd_stages": STAGES, "loss_factor": FACTOR, "teacher": str(teacher)}
    training = build_training(run, tmp_path / "images", batch_size=comm.size() * B, **options)
    torch.manual_seed(0)
    for module in training.trained["moco"].modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 1.0, 2.0)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    training.trained.eval()
    return training


def one_workers_losses(training, query, key):
    """Compute contrastive and distillation loss of the total batch, from the formulas.

    query, key: views (NB, 3, 32, 32) uint8. Uses no collective.
    """
    moco, [mgd] = training.trained["moco"], training.distillation.distillers
    encoded = moco.encoder_q(normalize(query))
    q = F.normalize(encoded["fc"])
    with torch.no_grad():
        k = F.normalize(moco.encoder_k(normalize(key)))
        guide = training.distillation.networks.teacher.net(normalize(query))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ moco.queue], dim=1) / T
    contrastive = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    targets = mgd.module.targets([guide[f"layer{stage}"] for stage in STAGES])
    return contrastive, mgd.module([encoded[f"layer{stage}"] for stage in STAGES], targets)


def test_convolutions_and_their_momenta_are_channels_last(training):
    """A step's views are the same on all workers."""
    views = torch.zeros(2, B, 3, 32, 32, dtype=torch.uint8)
    train(training, [[*views]])
    modules = [*training.trained.modules(), *training.distillation.networks.teacher.net.modules()]
    weights = [each.weight for each in modules if isinstance(each, torch.nn.Conv2d)]
    states = training.optimizer.state.items()
    momenta = [state["momentum_buffer"].stride() == value.stride() for value, state in states]
    layout = [each.is_contiguous(memory_format=torch.channels_last) for each in weights]
    every = allgather((all(momenta), all(layout)), "layouts")
    assert len(weights) == 20 + 20 + 53 and momenta
    assert every == [(True, True)] * comm.size()


def test_gradients_and_losses_equal_one_worker_s(training):
    random = torch.Generator().manual_seed(1)
    views = torch.randint(256, (2, comm.size() * B, 3, 32, 32), generator=random, dtype=torch.uint8)
    own = views[:, comm.rank() * B : (comm.rank() + 1) * B]
    named = dict(training.trained.named_parameters())
    named = {name: value for name, value in named.items() if value.requires_grad}
    names, parameters = list(named), list(named.values())
    losses = one_workers_losses(training, *views)
    options = {"retain_graph": True, "allow_unused": True}
    by_loss = [torch.autograd.grad(loss, parameters, **options) for loss in losses]
    contrastive, distillation = (dict(zip(names, gradients, strict=True)) for gradients in by_loss)
    [record] = train(training, [own]).records

    def largest(gradients):
        return max(value.abs().max().item() for value in gradients.values() if value is not None)

    def both(name):
        return sum(value for value in (contrastive[name], distillation[name]) if value is not None)

    off = {name: (value.grad - both(name)).abs().max().item() for name, value in named.items()}
    errors = allgather(off, "errors")
    norm = torch.stack([both(name).norm() for name in names]).norm().item()
    expected = {"contrastive": losses[0].item(), "distillation": losses[1].item()}
    assert 0.1 < largest(distillation) / largest(contrastive) < 10
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert record["loss"] == pytest.approx(sum(expected.values()), rel=1e-5)
    assert record["gradient_norm"] == pytest.approx(norm, rel=1e-4)  # of float32 squares
    for prefix in ("moco", "distillers"):
        scale = max(both(name).abs().max().item() for name in names if name.startswith(prefix))
        assert scale > 0
        own = [worker[name] for worker in errors for name in worker if name.startswith(prefix)]
        assert max(own) < 1e-5 * scale
