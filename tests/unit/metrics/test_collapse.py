"""What signs of collapse say of a student that has collapsed, and of one that has not."""

import math

import pytest
import torch
import torch.nn.functional as F

from job.metrics import collapse
from job.metrics.bounds import RANK, STD
from job.cluster import comm
from job.frameworks.base import Output
from job.frameworks.moco import MoCoFramework, build_moco
from pictures import photo

DIM, B, K, SIDE = 16, 16, 64, 32


def signs(net, queries, features=None):
    """The signs that MoCo reports."""
    framework = object.__new__(MoCoFramework)
    framework.module = net
    return framework.signs(Output({}, features or {"layer4": torch.ones(1, 1, 1, 1)}, queries, {}))


def warnings(found):
    return MoCoFramework.warnings(None, found)


def steps(net, number):
    """The signs after so many steps of training on photographs."""
    images = torch.stack([torch.from_numpy(photo(seed, 2 * SIDE, 2 * SIDE)) for seed in range(B)]).permute(0, 3, 1, 2)
    sgd = torch.optim.SGD(net.encoder_q.parameters(), 0.004, momentum=0.9)
    random = torch.Generator().manual_seed(1)
    for _ in range(number):
        y, x = torch.randint(SIDE, (2, 2), generator=random)
        query, key = (images[:, :, y[i] : y[i] + SIDE, x[i] : x[i] + SIDE] for i in range(2))
        keys = net.keys(key, torch.randperm(B, generator=random))
        found = net(query, keys)
        loss = F.cross_entropy(found.logits, torch.zeros(B, dtype=torch.long))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        net.enqueue(keys.total)
    return signs(net, found.queries, {name: found.encoded[name] for name in ("layer1", "layer4")})


def student():
    torch.manual_seed(0)
    return build_moco(comm, "resnet18", dim=DIM, K=K, T=0.2, mlp=True, stages=[1, 4]).train()


def test_a_student_that_begins_to_learn_is_no_collapse():
    """Also where its keys have filled the queue, which lag behind."""
    assert warnings(steps(student(), 10)) == {}


def test_a_student_whose_head_gives_one_vector_is_told_to_have_collapsed():
    net = student()
    for encoder in (net.encoder_q, net.encoder_k):
        torch.nn.init.zeros_(encoder.get_parameter("fc.2.weight"))
        torch.nn.init.ones_(encoder.get_parameter("fc.2.bias"))
    found = steps(net, 6)
    assert found["feature_std"] < STD and found["queue_rank"] < RANK
    assert list(warnings(found)) == ["same_features", "queue_rank"]


@pytest.mark.parametrize(("sign", "bound", "id"), [("feature_std", STD, "same_features"), ("queue_rank", RANK, "queue_rank")])
def test_a_warning_has_the_sign_and_its_bound(sign, bound, id):
    healthy = {"feature_std": 1.0, "queue_rank": 9.0, "dead_layer4": 0.0}
    assert warnings(healthy | {sign: bound}) == {}
    [(found, text)] = warnings(healthy | {sign: 0.9 * bound}).items()
    assert found == id and f"{0.9 * bound:.2f}" in text and str(bound) in text


def test_stages_with_dead_channels_are_one_warning():
    signs = {"feature_std": 1.0, "queue_rank": 9.0, "dead_layer2": 0.5, "dead_layer3": 0.75, "dead_layer4": 0.6}
    [(found, text)] = warnings(signs).items()
    assert found == "dead_channels" and all(part in text for part in ("75 % of layer3", "60 % of layer4"))
    assert "layer2" not in text


def test_channels_that_never_fire_are_told():
    net = student()
    torch.nn.init.constant_(net.encoder_q.get_parameter("layer4.1.bn2.bias"), -1e3)
    found = steps(net, 1)
    assert (found["dead_layer1"], found["dead_layer4"]) == (0, 1)
    assert "100 % of layer4" in warnings(found)["dead_channels"]


@pytest.mark.parametrize("directions", [1, 2, DIM])
def test_the_rank_of_the_queue_is_the_number_of_directions_that_its_keys_take_alike(directions):
    net = student()
    net.queue.copy_(torch.eye(DIM)[:, :directions].repeat(1, K // directions))
    assert math.isclose(signs(net, torch.eye(DIM))["queue_rank"], directions, rel_tol=1e-6)


def test_features_spread_over_the_sphere_have_deviation_one():
    queries = F.normalize(torch.randn(1000, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    assert abs(signs(student(), queries)["feature_std"] - 1) < 0.02


def test_signs_are_told_in_words():
    words = collapse.describe({"feature_std": 0.934, "queue_rank": 61.23, "dead_layer3": 0.0, "dead_layer4": 0.125})
    assert words == "deviation 0.93 of 1, rank of the queue 61.2, dead channels 0 % of layer3, 12 % of layer4"
