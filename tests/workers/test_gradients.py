"""The gradients of N workers against those of one that has all the images; batch norm in eval mode, so that they can be equal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job.cluster import comm
from job.engine.gradients import Gradients
from job.cluster.objects import allgather
from mgd.distiller import MGDistiller
from job.data.augment import normalize
from job.networks import build_resnet, stage_norms, with_features
from job.frameworks.moco import build_moco

B, K, DIM, T = 4, 32, 16, 0.2
STAGES = [1, 2, 3, 4]
FACTOR = 200.0  # its gradients and the contrastive ones are of one size


@pytest.fixture(scope="module")
def parts():
    """A student, a teacher and the distiller between them, in eval mode; the total batch's two views (NB, 3, 32, 32) uint8."""
    torch.manual_seed(0)
    moco = build_moco(comm, "resnet18", dim=DIM, K=K, m=1.0, T=T, mlp=True, stages=STAGES)
    net = build_resnet("resnet50")
    for module in [*moco.modules(), *net.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 1.0, 2.0)
            nn.init.normal_(module.bias, 0.0, 0.3)
    norms = stage_norms(net)
    widths = {stage: norm.num_features for stage, norm in stage_norms(moco.encoder_k).items()}
    distiller = MGDistiller({stage: (widths[stage], norms[stage].num_features) for stage in STAGES}, factor=FACTOR)
    distiller.load_margins(norms)
    teacher = with_features(net, STAGES, output=None)
    views = torch.randint(256, (2, comm.size() * B, 3, 32, 32), dtype=torch.uint8)
    return moco.eval(), teacher.eval(), distiller.eval(), views


def distil(distiller, teacher, features, images):
    with torch.no_grad():
        guide = teacher(normalize(images))
    return distiller(features, distiller.targets([guide[f"layer{stage}"] for stage in STAGES]))


def workers_gradients(parts):
    """Gradients as an optimizer gets them, and this worker's contrastive and distillation losses."""
    moco, teacher, distiller, views = parts
    query, key = views[:, comm.rank() * B : (comm.rank() + 1) * B]
    named = [(name, value) for name, value in nn.ModuleDict({"moco": moco, "mgd": distiller}).named_parameters()]
    named = [(name, value) for name, value in named if value.requires_grad]
    gradients = Gradients(named)
    logits, _, encoded = moco(query, moco.keys(key, torch.randperm(len(views[0]), generator=torch.Generator().manual_seed(2))))
    features = [encoded[f"layer{stage}"] for stage in STAGES]
    losses = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)), distil(distiller, teacher, features, query)
    gradients.clear()
    sum(losses).backward()
    gradients.wait()
    return {name: value.grad.clone() for name, value in named}, torch.stack(losses).detach()


def one_workers_losses(parts):
    """The contrastive and the distillation loss of the total batch, with nothing that travels."""
    moco, teacher, distiller, (query, key) = parts
    encoded = moco.encoder_q(normalize(query))
    q = F.normalize(encoded["fc"])
    with torch.no_grad():
        k = F.normalize(moco.encoder_k(normalize(key)))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ moco.queue], dim=1) / T
    contrastive = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    return contrastive, distil(distiller, teacher, [encoded[f"layer{stage}"] for stage in STAGES], query)


def test_gradients_and_losses_equal_those_of_one_worker_on_the_total_batch(parts):
    moco, _, distiller, _ = parts
    found, losses = workers_gradients(parts)
    trained = nn.ModuleDict({"moco": moco, "mgd": distiller})
    names = [name for name, value in trained.named_parameters() if value.requires_grad]
    parameters = [trained.get_parameter(name) for name in names]
    expected_losses = one_workers_losses(parts)
    by_loss = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in expected_losses]
    contrastive, distillation = (dict(zip(names, gradients, strict=True)) for gradients in by_loss)

    def largest(gradients):
        return max(value.abs().max().item() for value in gradients.values() if value is not None)

    def both(name):
        return sum(value for value in (contrastive[name], distillation[name]) if value is not None)

    errors = allgather({name: (found[name] - both(name)).abs().max().item() for name in names}, "errors")
    mean = comm.total(losses, "losses") / comm.size()  # the average over the workers
    assert 0.1 < largest(distillation) / largest(contrastive) < 10
    torch.testing.assert_close(mean, torch.stack(expected_losses).detach(), rtol=1e-5, atol=0.0)
    for prefix in ("moco", "mgd"):
        scale = max(both(name).abs().max().item() for name in names if name.startswith(prefix))
        assert scale > 0
        assert max(error for worker in errors for name, error in worker.items() if name.startswith(prefix)) < 1e-5 * scale
