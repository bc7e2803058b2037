"""MoCo on N workers against one process that does the work of all, written anew from the formulas of arXiv 1911.05722.

Both compute in float32 and differ in the order of sums alone: gradients over the workers, keys within a batch,
the momentum as one lerp or two products. That is 1e-7 a step, which the batch norms of 4 images magnify.
"""

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.models import resnet18

from moco.model import MoCo

B, K, DIM, STEPS = 4, 18, 16, 5  # no multiple of B is K, and the ring wraps even for one worker
MOMENTUM, TEMPERATURE = 0.9, 0.2  # a momentum that moves the keys within STEPS
SGD = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
TOLERANCE = 1e-4


def steps():
    """Each step's query and key views of the total batch, (2, NB, 3, 32, 32) uint8, and its permutation (NB,)."""
    NB, generator = hvd.size() * B, torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        views = torch.randint(256, (2, NB, 3, 32, 32), generator=generator, dtype=torch.uint8)
        yield views, torch.randperm(NB, generator=generator)


def share(total):
    """This worker's part of a total batch (NB, ...)."""
    return total[hvd.rank() * B : (hvd.rank() + 1) * B]


def work(moco):
    """Train this worker's MoCo as job.train does; return its logits, (STEPS, B, 1 + K)."""
    parameters = [(name, value) for name, value in moco.named_parameters() if value.requires_grad]
    sgd = torch.optim.SGD([value for _, value in parameters], **SGD)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=parameters, groups=4)
    every = []
    for (query, key), permutation in steps():
        logits, _, keys = moco(share(query), share(key), permutation)
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)).backward()
        optimizer.step()
        moco.enqueue(keys)
        every.append(logits.detach())
    return torch.stack(every)


def normalised(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
    return (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def emulate(N, start):
    """Do what N workers with MoCo's state `start` do; return every worker's logits, and the final state of each."""
    net = resnet18(num_classes=DIM)
    net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), net.fc)
    query = {name: start[f"encoder_q.{name}"].clone().requires_grad_() for name, _ in net.named_parameters()}
    key = {name: start[f"encoder_k.{name}"].clone() for name, _ in net.named_parameters()}
    norms = {
        encoder: [{name: start[f"{encoder}.{name}"].clone() for name, _ in net.named_buffers()} for _ in range(N)]
        for encoder in ("encoder_q", "encoder_k")
    }
    queue, place = start["queue"].clone(), 0
    optimizer = torch.optim.SGD(query.values(), **SGD)
    every = [[] for _ in range(N)]

    for (query_views, key_views), permutation in steps():
        with torch.no_grad():
            for name, value in key.items():
                value.copy_(MOMENTUM * value + (1 - MOMENTUM) * query[name])
            k = torch.empty(N * B, DIM)
            for w, mixed in enumerate(permutation.split(B)):
                k[mixed] = F.normalize(functional_call(net, (key, norms["encoder_k"][w]), normalised(key_views[mixed])))
        optimizer.zero_grad()
        for w, (own, own_k) in enumerate(zip(query_views.split(B), k.split(B), strict=True)):
            q = F.normalize(functional_call(net, (query, norms["encoder_q"][w]), normalised(own)))
            scores = [torch.stack([q[i] @ own_k[i], *(q[i] @ queue)]) for i in range(B)]
            logits = torch.stack(scores) / TEMPERATURE
            loss = -logits.log_softmax(1)[:, 0].mean()
            (loss / N).backward()  # the gradients of the workers add up to their average
            every[w].append(logits.detach())
        optimizer.step()
        for one in k:
            queue[:, place] = one
            place = (place + 1) % K

    shared = {f"encoder_q.{name}": value.detach() for name, value in query.items()}
    shared |= {f"encoder_k.{name}": value for name, value in key.items()} | {"queue": queue, "queue_ptr": torch.tensor([place])}
    own = [{f"{encoder}.{name}": value for encoder in norms for name, value in norms[encoder][w].items()} for w in range(N)]
    return [torch.stack(logits) for logits in every], [shared | buffers for buffers in own]


@pytest.fixture(scope="module")
def both():
    """The logits and states of this worker: before, after its steps, and what the emulation says of them."""
    torch.manual_seed(0)
    moco = MoCo("resnet18", dim=DIM, K=K, m=MOMENTUM, T=TEMPERATURE, mlp=True)
    before = {name: value.clone() for name, value in moco.state_dict().items()}
    logits = work(moco)
    expected_logits, expected = emulate(hvd.size(), before)
    return (
        before | {"logits": torch.zeros_like(logits)},
        moco.state_dict() | {"logits": logits},
        expected[hvd.rank()] | {"logits": expected_logits[hvd.rank()]},
    )


PARTS = {
    "logits": lambda name: name == "logits",
    "queue": lambda name: name == "queue",
    "query encoder": lambda name: name.startswith("encoder_q") and not name.endswith(("mean", "var", "tracked")),
    "key encoder": lambda name: name.startswith("encoder_k") and not name.endswith(("mean", "var", "tracked")),
    "query norms": lambda name: name.startswith("encoder_q") and name.endswith(("mean", "var")),
    "key norms": lambda name: name.startswith("encoder_k") and name.endswith(("mean", "var")),
}


@pytest.mark.parametrize("part", PARTS)
def test_workers_equal_one_process_with_batch_norm_of_each_in(both, part):
    """Measured on how far the steps have moved each part; the norms' running statistics are each worker's own."""
    before, after, expected = (
        torch.cat([value.flatten() for name, value in sorted(state.items()) if PARTS[part](name)]) for state in both
    )
    moved, error = (expected - before).abs().max(), (after - expected).abs().max()
    found = hvd.allgather_object((moved.item(), error.item()), name="found")
    assert min(moved for moved, _ in found) > 1e-3
    assert max(error / moved for moved, error in found) < TOLERANCE


def test_pointer_is_where_one_process_has_it(both):
    _, after, _ = both
    pointers = hvd.allgather_object(after["queue_ptr"].tolist(), name="pointers")
    assert pointers == [[STEPS * hvd.size() * B % K]] * hvd.size()


def test_queue_and_pointer_have_the_same_bytes_on_all_workers(both):
    _, after, _ = both
    held = hvd.allgather_object((after["queue"].numpy().tobytes(), after["queue_ptr"].numpy().tobytes()), name="held")
    assert all(mine == held[0] for mine in held)
