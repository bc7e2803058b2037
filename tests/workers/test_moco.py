"""The program's steps of MoCo on N workers against one process that does the work of all.

`emulate` is the independent statement of the mathematics, from the formulas of arXiv 1911.05722.
Both compute in float64. Only the order of sums differs, but the batch norms of 4 images make 50
times more of that with each step: float32 would end within 1e-2 and hide mistakes, float64 ends
within 1e-8.
"""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.models import resnet18

from job.cluster import comm
from job.cluster.objects import allgather, broadcast
from job.data import randomness
from job.frameworks.moco import build_moco
from steps import build_training, train

B, K, DIM, STEPS = (
    4,
    18,
    16,
    5,
)  # no batch divides K, and the ring wraps even for one worker; batch norms of 2 are chaotic
MOMENTUM, TEMPERATURE = 0.9, 0.2  # a momentum that moves the keys within STEPS
SGD = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
SEED = 3
TOLERANCE = 1e-6  # of how far the steps have moved a value


def steps(NB):
    """Each step's query and key views of the total batch, (2, NB, 3, 32, 32), and its permutation (NB,)."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        permutation = randomness.permutation(NB, SEED, "shuffle", step=step)
        views = torch.randn(2, NB, 3, 32, 32, generator=generator, dtype=torch.float64)
        yield views, torch.from_numpy(permutation)


def share(total):
    """This worker's share of a total batch (NB, ...)."""
    return total.chunk(comm.size())[comm.rank()]


def work(run, folder, parts):
    """Let the program train MoCo on this worker's views, each step in `parts` of B images.

    Return its state before and after, with the logits (STEPS, parts * B, 1 + K) of all steps.
    """
    NB = comm.size() * parts * B
    options = {"moco_dim": DIM, "moco_k": K, "moco_m": MOMENTUM, "moco_t": TEMPERATURE, **SGD}
    options |= {"batch_size": NB, "accumulate": parts, "seed": SEED}
    training = build_training(run, folder / "images", **options)
    moco = training.framework.module.double()
    before, after, logits = copy(moco), {}, []
    moco.register_forward_hook(lambda _, given, found: logits.append(found.logits.detach()))
    own = [[share(view) for view in views] for views, _ in steps(NB)]
    train(training, own, before_average=lambda: after.update(copy(moco)))
    before["logits"] = torch.zeros(())
    after["logits"] = torch.cat(logits).view(STEPS, parts * B, -1)
    return before, after


def copy(moco):
    """A copy of a network's state."""
    return {name: value.clone() for name, value in moco.state_dict().items()}


def emulate(N, start):
    """Do what N workers of B images with MoCo's state `start` do; return every worker's logits, and the final state of each."""
    net = resnet18(num_classes=DIM)
    net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), net.fc)  # MoCo v2's head
    query = {
        name: start[f"encoder_q.{name}"].clone().requires_grad_()
        for name, _ in net.named_parameters()
    }
    key = {name: start[f"encoder_k.{name}"].clone() for name, _ in net.named_parameters()}
    norms = {
        encoder: [
            {name: start[f"{encoder}.{name}"].clone() for name, _ in net.named_buffers()}
            for _ in range(N)
        ]
        for encoder in ("encoder_q", "encoder_k")
    }
    queue, place = start["queue"].clone(), 0
    optimizer = torch.optim.SGD(query.values(), **SGD)
    every = [[] for _ in range(N)]

    for (query_views, key_views), permutation in steps(N * B):
        with torch.no_grad():
            for name, value in key.items():
                value.copy_(MOMENTUM * value + (1 - MOMENTUM) * query[name])
            k = torch.empty(N * B, DIM, dtype=torch.float64)
            for w, mixed in enumerate(permutation.split(B)):
                k[mixed] = F.normalize(
                    functional_call(net, (key, norms["encoder_k"][w]), key_views[mixed])
                )
        optimizer.zero_grad()
        for w, (own, own_k) in enumerate(zip(query_views.split(B), k.split(B), strict=True)):
            q = F.normalize(functional_call(net, (query, norms["encoder_q"][w]), own))
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
    shared |= {f"encoder_k.{name}": value for name, value in key.items()} | {
        "queue": queue,
        "queue_ptr": torch.tensor([place]),
    }
    own = [
        {
            f"{encoder}.{name}": value
            for encoder in norms
            for name, value in norms[encoder][w].items()
        }
        for w in range(N)
    ]
    return [torch.stack(logits) for logits in every], [shared | buffers for buffers in own]


PARTS = {  # of a worker's state and logits, by their names
    "logits": lambda name: name == "logits",
    "queue": lambda name: name == "queue",
    "query encoder": lambda name: name.startswith("encoder_q") and not is_norm(name),
    "key encoder": lambda name: name.startswith("encoder_k") and not is_norm(name),
    "query norms": lambda name: name.startswith("encoder_q") and name.endswith(("mean", "var")),
    "key norms": lambda name: name.startswith("encoder_k") and name.endswith(("mean", "var")),
}


def is_norm(name):
    """Whether it is a running statistic, which each worker has for itself."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def largest(one, other, names):
    return max((one[name] - other[name]).abs().max().item() for name in names)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """(moved, errors, held): how far the emulation has moved each part on each worker, [worker][part], how far off the
    worker is, and a digest of what all workers share. The first worker emulates: parameters are too many to send."""
    before, after = work(run, tmp_path_factory.mktemp("trained"), parts=1)
    own = {name: value for name, value in after.items() if is_norm(name) or name == "logits"}
    shared = {name: value for name, value in after.items() if name not in own}
    shared = {name: hashlib.sha256(value.numpy()).hexdigest() for name, value in shared.items()}
    workers = allgather((own, shared), "workers")

    moved, errors = [], []
    if comm.rank() == 0:
        for (own, _), every, expected in zip(workers, *emulate(comm.size(), before), strict=True):
            expected["logits"] = every
            parts = {part: [name for name in expected if of(name)] for part, of in PARTS.items()}
            moved.append({part: largest(expected, before, names) for part, names in parts.items()})
            errors.append(
                {part: largest(expected, after | own, names) for part, names in parts.items()}
            )
            errors[-1]["pointer"] = largest(expected, after, ["queue_ptr"])
    moved, errors = broadcast((moved, errors))
    return moved, errors, [shared for _, shared in workers]


@pytest.mark.parametrize("part", PARTS)
def test_workers_equal_one_process_with_batch_norm_of_each_in(trained, part):
    """The norms' running statistics are each worker's own: they show beside which images a key was encoded."""
    moved, errors, _ = trained
    assert len(errors) == comm.size()
    for far, off in zip(moved, errors, strict=True):
        assert far[part] > 1e-3
        assert off[part] < TOLERANCE * far[part]


def test_pointer_is_where_one_process_has_it(trained):
    _, errors, _ = trained
    assert [off["pointer"] for off in errors] == [0] * comm.size()


def test_queue_and_pointer_have_the_same_bytes_on_all_workers(trained):
    _, _, held = trained
    assert all({"queue", "queue_ptr"} <= mine.keys() for mine in held)
    assert len({(mine["queue"], mine["queue_ptr"]) for mine in held}) == 1


def test_encoders_have_the_same_bytes_on_all_workers(trained):
    _, _, held = trained
    assert all(mine == held[0] for mine in held)


def test_the_parts_of_a_batch_are_workers_of_their_own(run, tmp_path):
    """N workers with two parts are 2N workers, except for the running statistics of the parts."""
    before, found = work(run, tmp_path, parts=2)
    found["logits"] = torch.cat(allgather(found["logits"], "parts.logits"), dim=1)
    off = {}
    if comm.rank() == 0:
        every, [expected, *_] = emulate(2 * comm.size(), before)
        expected["logits"] = torch.cat(every, dim=1)  # (STEPS, NB, 1 + K)
        for part in ("logits", "queue", "query encoder", "key encoder"):
            names = [name for name in expected if PARTS[part](name)]
            off[part] = largest(expected, found, names) / largest(expected, before, names)
    off = broadcast(off)
    assert len(off) == 4
    assert max(off.values()) < TOLERANCE


def test_under_autocast_the_passes_alone_lose_precision():
    """Logits lie within +-1 / TEMPERATURE; batch norm of 4 images may leave a fifth of that range of bf16's rounding."""
    torch.manual_seed(0)
    moco = build_moco(comm, "resnet18", dim=DIM, K=K, T=TEMPERATURE, mlp=True, stages=[4])
    views, permutation = torch.randn(2, comm.size() * B, 3, 32, 32), torch.randperm(comm.size() * B)
    exact_keys = moco.keys(share(views[1]), permutation)
    exact = moco(share(views[0]), exact_keys).logits
    keys = moco.keys(share(views[1]), permutation)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, encoded = moco(share(views[0]), keys)
    keys, exact_keys = keys.total, exact_keys.total
    assert (logits.dtype, keys.dtype, encoded["layer4"].dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys)))
    logits.sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in moco.encoder_q.parameters())
    errors = allgather(
        [(logits - exact).abs().max().item(), (keys - exact_keys).abs().max().item()], "lost"
    )
    assert 0 < max(error for pair in errors for error in pair) < 2 / TEMPERATURE / 5


@torch.no_grad()
def test_views_of_bytes_give_the_logits_of_their_normalised_floats():
    """In float32, as bytes are normalised to it: batch norm of 4 images leaves 1e-4 of a logit."""
    torch.manual_seed(0)
    moco = build_moco(comm, "resnet18", dim=DIM, K=K, T=TEMPERATURE)
    bytes_, permutation = (
        torch.randint(256, (2, comm.size() * B, 3, 32, 32), dtype=torch.uint8),
        torch.randperm(comm.size() * B),
    )
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]),
        torch.tensor([0.229, 0.224, 0.225]),
    )  # of ImageNet
    floats = (bytes_ / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    of_bytes, of_floats = (
        moco(share(views[0]), moco.keys(share(views[1]), permutation)).logits
        for views in (bytes_, floats)
    )
    error = allgather((of_bytes - of_floats).abs().max().item(), "error")
    assert max(error) < 1e-3
