"""A run with a momentum encoder: on N workers as in one process, and compared between workers."""

import copy

import pytest
import torch
import torch.nn.functional as F

from job.cluster import comm
from job.cluster.objects import allgather
from job.data.augment import normalize
from job.distill.momentum import MOMENTUM
from job.engine import replicas, statistics
from job.errors import RunError
from steps import build_training, save_teacher, train

NB, K, STEPS, M, T = 16, 20, 4, 0.5, 0.1  # the queue wraps
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
PREFIX, QUEUE = f"distillers.{MOMENTUM}.", "distillers.similarity.queue"
TOLERANCE = 1e-3  # of how far the steps have moved a value


def build(run, folder, accumulate=1):
    """A training of CompRess on narrow networks."""
    if comm.rank() == 0:
        save_teacher(folder / "teacher.pth", width=16)
    options = {"framework": "none", "distill": ["similarity"], "similarity": "compress", **SGD}
    options |= {"similarity_k": K, "similarity_m": M, "similarity_t": T, "similarity_teacher_t": T}
    options |= {"width": 16, "batch_size": NB, "accumulate": accumulate, "mlp": False}
    options |= {"loss_share": 0.0, "loss_factor": 1.0, "teacher": str(folder / "teacher.pth")}
    return build_training(run, folder / "images", **options)


def views():
    """Each step's images of the total batch, (NB, 3, 32, 32) uint8."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(256, (STEPS, NB, 3, 32, 32), generator=generator, dtype=torch.uint8))


def own(total):
    """This worker's images of a total batch."""
    return total.chunk(comm.size())[comm.rank()]


def features(net, images):
    """Normalised pooled features (NB, C)."""
    return F.normalize(net(images)["layer4"].relu().mean((2, 3)), dim=1)


def emulate(training):
    """Do the steps in one process; return the student, its follower, and the two queues (K, C)."""
    student, follower = (copy.deepcopy(training.framework.encoder).eval() for _ in range(2))
    teacher = training.distillation.networks.teacher.net
    queue = training.distillation.distillers[0].module.queue.clone()
    width = teacher(torch.zeros(1, 3, 32, 32))["layer4"].shape[1]
    theirs, ours = queue[:width].T.clone(), queue[width:].T.clone()
    optimizer, place = torch.optim.SGD(student.parameters(), **SGD), 0
    for images in map(normalize, views()):
        with torch.no_grad():
            t, followed = features(teacher, images), features(follower, images)
        wanted = F.softmax(t @ theirs.T / T, dim=1)
        found = F.log_softmax(features(student, images) @ ours.T / T, dim=1)
        optimizer.zero_grad()
        (-(wanted * found).sum(1).mean()).backward()
        optimizer.step()
        for mine, new in zip(follower.parameters(), student.parameters(), strict=True):
            mine.data = M * mine.data + (1 - M) * new.data
        for image in range(NB):
            theirs[place], ours[place] = t[image], followed[image]
            place = (place + 1) % K
    return student, follower, torch.cat([theirs, ours], dim=1).T


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_one_process(run, tmp_path, accumulate):
    """Without the statistics of batches, which depend on the number of workers."""
    training = build(run, tmp_path, accumulate)
    training.trained.eval()
    student, follower, queue = emulate(training)
    start = {name: value.clone() for name, value in training.trained.state_dict().items()}
    train(training, [[own(images)] for images in views()])
    expected = {QUEUE: queue}
    for prefix, net in (("none.encoder_q.", student), (PREFIX, follower)):
        expected |= {prefix + name: value.detach() for name, value in net.named_parameters()}
    state, off = training.trained.state_dict(), {}
    for name, value in expected.items():
        off[name] = ((state[name] - value).norm() / (value - start[name]).norm()).item()
    everywhere = allgather(max(off.values()), "off")
    assert max(everywhere) < TOLERANCE, off


def test_the_workers_share_all_but_its_running_statistics_and_the_optimizer_has_none_of_it(
    run,
    tmp_path,
):
    """A bit of it that flips on one worker is named on all."""
    training = build(run, tmp_path)
    spread = {}

    def before_average():
        spread.update(statistics.own_statistics(training.trained))
        spread.update({name: value.clone() for name, value in spread.items()})

    train(training, [[own(images)] for images in views()], before_average)
    norm = f"{PREFIX}bn1.running_mean"
    gathered = allgather(spread[norm].tolist(), "own")
    assert all(mine != gathered[0] for mine in gathered[1:])
    averaged = allgather(training.trained.state_dict()[norm].tolist(), "averaged")
    assert all(mine == averaged[0] for mine in averaged)

    shared = training.shared()
    named = {name.removeprefix(PREFIX) for name in shared if name.startswith(PREFIX)}
    assert "conv1.weight" in named and "bn1.running_mean" not in named
    replicas.check(shared, "now")
    encoder = training.distillation.momentum.module
    groups = training.optimizer.param_groups
    optimized = {id(value) for group in groups for value in group["params"]}
    assert not any(id(value) in optimized for value in encoder.parameters())
    if 0 < comm.rank() == comm.size() - 1:
        encoder.conv1.weight.view(-1).view(torch.int32)[5] ^= 1
    said = ""
    try:
        replicas.check(shared, "now")
    except RunError as error:
        said = str(error)
    told = allgather(said, "said")
    expected = f"the first is {PREFIX}conv1.weight" if comm.size() > 1 else ""
    assert all(expected in each and bool(each) == bool(expected) for each in told)
