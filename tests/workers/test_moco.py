"""The program's steps of MoCo on N workers against one process that does the steps of all.

`emulate` computes the steps from the formulas of arXiv 1911.05722, with the program's network,
which tests/unit/test_networks.py compares with torchvision's. Both compute in float64. Only the
order of sums differs, but the batch norms of 4 images enlarge rounding errors 50 times a step.
In float32 the error would reach 1e-2 and hide mistakes. In float64 it stays below 1e-8.

N: workers. B: images of a micro-batch. NB: images of the total batch. K: keys of the queue.
"""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from job.cluster import comm
from job.cluster.objects import allgather, broadcast
from job.data import randomness
from job.frameworks.moco import build_moco
from job.networks import build_resnet
from steps import build_training, train

# No batch divides K, and the queue wraps even for one worker. Batch norms of 2 images are chaotic.
B, K, DIM, STEPS = 4, 18, 16, 5
WIDTH = 16  # channels of the first stage
MOMENTUM, TEMPERATURE = 0.9, 0.2  # with this momentum the keys change within STEPS
SGD = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4}
SEED = 3
TOLERANCE = 1e-6  # fraction of a value's change over the steps


def steps(NB):
    """Yield each step's views of the total batch, (2, NB, 3, 32, 32), and permutation, (NB,)."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        permutation = randomness.permutation(NB, SEED, "shuffle", step=step)
        views = torch.randn(2, NB, 3, 32, 32, generator=generator, dtype=torch.float64)
        yield views, torch.from_numpy(permutation)


def own(total):
    """Return this worker's images of a total batch (NB, ...)."""
    return total.chunk(comm.size())[comm.rank()]


def train_moco(run, folder, accumulate):
    """Train MoCo with the program, each step in `accumulate` micro-batches of B images.

    Return its state before and after, with the logits (STEPS, accumulate * B, 1 + K).
    """
    NB = comm.size() * accumulate * B
    options = {"moco_dim": DIM, "moco_k": K, "moco_m": MOMENTUM, "moco_t": TEMPERATURE, **SGD}
    options |= {"batch_size": NB, "accumulate": accumulate, "seed": SEED}
    options["width"] = WIDTH
    training = build_training(run, folder / "images", **options)
    moco = training.framework.module.double()
    before, after, logits = copy(moco), {}, []
    moco.register_forward_hook(lambda _, inputs, out: logits.append(out.logits.detach()))
    batches = [[own(view) for view in views] for views, _ in steps(NB)]
    train(training, batches, before_average=lambda: after.update(copy(moco)))
    before["logits"] = torch.zeros(())
    after["logits"] = torch.cat(logits).view(STEPS, accumulate * B, -1)
    return before, after


def copy(moco):
    """Return a copy of a network's state."""
    return {name: value.clone() for name, value in moco.state_dict().items()}


def emulate(N, start):
    """Compute the steps of N workers, with B images each, from MoCo's state `start`.

    Return every worker's logits, and the final state of each.
    """
    net = build_resnet("resnet18", DIM, mlp=True, width=WIDTH)
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
    queue, pointer = start["queue"].clone(), 0
    optimizer = torch.optim.SGD(query.values(), **SGD)
    all_logits = [[] for _ in range(N)]

    for (query_views, key_views), permutation in steps(N * B):
        with torch.no_grad():
            for name, value in key.items():
                value.copy_(MOMENTUM * value + (1 - MOMENTUM) * query[name])
            k = torch.empty(N * B, DIM, dtype=torch.float64)
            for w, chosen in enumerate(permutation.split(B)):
                encoded = functional_call(net, (key, norms["encoder_k"][w]), key_views[chosen])
                k[chosen] = F.normalize(encoded)
        optimizer.zero_grad()
        for w, (images, own_k) in enumerate(zip(query_views.split(B), k.split(B), strict=True)):
            q = F.normalize(functional_call(net, (query, norms["encoder_q"][w]), images))
            scores = [torch.stack([q[i] @ own_k[i], *(q[i] @ queue)]) for i in range(B)]
            logits = torch.stack(scores) / TEMPERATURE
            loss = -logits.log_softmax(1)[:, 0].mean()
            (loss / N).backward()  # the sum over the workers is their average gradient
            all_logits[w].append(logits.detach())
        optimizer.step()
        for one in k:
            queue[:, pointer] = one
            pointer = (pointer + 1) % K

    shared = {f"encoder_q.{name}": value.detach() for name, value in query.items()}
    shared |= {f"encoder_k.{name}": value for name, value in key.items()} | {
        "queue": queue,
        "queue_ptr": torch.tensor([pointer]),
    }
    own_norms = [
        {
            f"{encoder}.{name}": value
            for encoder in norms
            for name, value in norms[encoder][w].items()
        }
        for w in range(N)
    ]
    return list(map(torch.stack, all_logits)), [shared | buffers for buffers in own_norms]


GROUPS = {  # of a worker's state and logits: whether a name belongs to it
    "logits": lambda name: name == "logits",
    "queue": lambda name: name == "queue",
    "query encoder": lambda name: name.startswith("encoder_q") and not is_norm(name),
    "key encoder": lambda name: name.startswith("encoder_k") and not is_norm(name),
    "query norms": lambda name: name.startswith("encoder_q") and name.endswith(("mean", "var")),
    "key norms": lambda name: name.startswith("encoder_k") and name.endswith(("mean", "var")),
}


def is_norm(name):
    """Return whether it is a running statistic. Each worker has its own."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def largest(one, other, names):
    """Return the largest difference between two states in these names."""
    return max((one[name] - other[name]).abs().max().item() for name in names)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """(moved, errors, digests) after a training.

    moved, errors: [worker][group], the largest change in the emulation and the largest difference
    from it. digests: of the values that must be equal, [worker][name]. Only the first worker
    emulates, because the parameters are too many to send.
    """
    before, after = train_moco(run, tmp_path_factory.mktemp("trained"), accumulate=1)
    mine = {name: value for name, value in after.items() if is_norm(name) or name == "logits"}
    shared = {name: value for name, value in after.items() if name not in mine}
    shared = {
        name: hashlib.sha256(value.contiguous().numpy()).hexdigest()
        for name, value in shared.items()
    }
    workers = allgather((mine, shared), "workers")

    moved, errors = [], []
    if comm.rank() == 0:
        emulated = emulate(comm.size(), before)
        for (mine, _), logits, expected in zip(workers, *emulated, strict=True):
            expected["logits"] = logits
            groups = {
                group: [name for name in expected if of(name)] for group, of in GROUPS.items()
            }
            moved.append(
                {group: largest(expected, before, names) for group, names in groups.items()}
            )
            errors.append(
                {group: largest(expected, after | mine, names) for group, names in groups.items()}
            )
            errors[-1]["pointer"] = largest(expected, after, ["queue_ptr"])
    moved, errors = broadcast((moved, errors))
    return moved, errors, [shared for _, shared in workers]


@pytest.mark.parametrize("group", GROUPS)
def test_training_equals_one_process_s(trained, group):
    """Each worker's own running statistics show which images were encoded together."""
    moved, errors, _ = trained
    assert len(errors) == comm.size()
    for change, error in zip(moved, errors, strict=True):
        assert change[group] > 1e-3
        assert error[group] < TOLERANCE * change[group]


def test_pointer_equals_one_process_s(trained):
    _, errors, _ = trained
    assert [error["pointer"] for error in errors] == [0] * comm.size()


def test_queue_and_encoders_have_the_same_bytes(trained):
    """They are the same on all workers, and so is the queue's pointer."""
    _, _, digests = trained
    assert {"queue", "queue_ptr", "encoder_q.conv1.weight"} <= digests[0].keys()
    assert all(mine == digests[0] for mine in digests)


def test_micro_batches_are_like_more_workers(run, tmp_path):
    """N workers with two micro-batches are 2N workers, except for running statistics."""
    before, after = train_moco(run, tmp_path, accumulate=2)
    after["logits"] = torch.cat(allgather(after["logits"], "parts.logits"), dim=1)
    errors = {}
    if comm.rank() == 0:
        logits, [expected, *_] = emulate(2 * comm.size(), before)
        expected["logits"] = torch.cat(logits, dim=1)  # (STEPS, NB, 1 + K)
        for group in ("logits", "queue", "query encoder", "key encoder"):
            names = [name for name in expected if GROUPS[group](name)]
            change = largest(expected, before, names)
            errors[group] = largest(expected, after, names) / change
    errors = broadcast(errors)
    assert len(errors) == 4
    assert max(errors.values()) < TOLERANCE


def test_autocast_changes_only_the_passes():
    """Logits are within +-1 / TEMPERATURE.

    With batch norms of 4 images, rounding to bf16 may change them by a fifth of that range.
    """
    torch.manual_seed(0)
    moco = build_moco(comm, "resnet18", dim=DIM, K=K, T=TEMPERATURE, mlp=True, stages=[4])
    views, permutation = torch.randn(2, comm.size() * B, 3, 32, 32), torch.randperm(comm.size() * B)
    exact_keys = moco.keys(own(views[1]), permutation)
    exact = moco(own(views[0]), exact_keys).logits
    keys = moco.keys(own(views[1]), permutation)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, encoded = moco(own(views[0]), keys)
    keys, exact_keys = keys.total, exact_keys.total
    assert logits.dtype == keys.dtype == torch.float32
    assert encoded["layer4"].dtype == torch.bfloat16
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys)))
    logits.sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in moco.encoder_q.parameters())
    own_errors = [(logits - exact).abs().max().item(), (keys - exact_keys).abs().max().item()]
    errors = allgather(own_errors, "errors")
    assert 0 < max(error for pair in errors for error in pair) < 2 / TEMPERATURE / 5


@torch.no_grad()
def test_views_of_bytes_have_the_logits_of_floats():
    """The floats are normalised. In float32, batch norm of 4 images leaves errors of 1e-4."""
    torch.manual_seed(0)
    moco = build_moco(comm, "resnet18", dim=DIM, K=K, T=TEMPERATURE)
    NB = comm.size() * B
    bytes_ = torch.randint(256, (2, NB, 3, 32, 32), dtype=torch.uint8)
    permutation = torch.randperm(NB)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # of ImageNet
    floats = (bytes_ / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    of_bytes, of_floats = (
        moco(own(views[0]), moco.keys(own(views[1]), permutation)).logits
        for views in (bytes_, floats)
    )
    error = allgather((of_bytes - of_floats).abs().max().item(), "error")
    assert max(error) < 1e-3
