"""k-NN: votes, keys, and the choice of k."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from job.evaluate import knn
from job.data.images import Images, Names
from job.evaluate.knn import choose_k, from_keys, nearest, counts, to_keys, vote


def slow_predictions(bank, bank_labels, features, k, temperature):
    """Return predictions in a loop over images and votes."""
    predicted = []
    for feature in features.tolist():
        cosines = [
            sum(a * b for a, b in zip(feature, other, strict=True)) for other in bank.tolist()
        ]
        votes = {}
        for index in sorted(range(len(cosines)), key=lambda index: -cosines[index])[:k]:
            label = int(bank_labels[index])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[index] / temperature)
        predicted.append(max(votes, key=votes.get))
    return predicted


def predictions(bank, bank_labels, features, k, block=7, classes=5):
    """Return one worker's predictions, from blocks of the bank."""
    blocks = list(zip(bank.split(block), bank_labels.split(block), strict=True))
    return vote(nearest(features, blocks, k), k, classes)


def random_set(n, classes, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    return features, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize(("n", "m", "classes"), [(40, 30, 3), (25, 300, 5), (6, 10, 2)])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (1000, 0.3)])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_vote_equals_a_slow_loop(monkeypatch, n, m, classes, k, temperature, block):
    monkeypatch.setattr(knn, "TEMPERATURE", temperature)
    bank, bank_labels = random_set(n, classes, seed=1)
    features, _ = random_set(m, classes, seed=2)
    expected = slow_predictions(bank, bank_labels, features, k, temperature)
    assert predictions(bank, bank_labels, features, k, block).tolist() == expected
    assert len(set(expected)) > 1


def test_vote_weighs_the_nearest_more(monkeypatch):
    """One vote of cosine 1 wins over two of 0.5 at a low temperature, and loses at a high one."""
    bank, labels = (
        torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]]),
        torch.tensor([0, 1, 1]),
    )
    assert predictions(bank, labels, bank[:1], k=3).tolist() == [0]
    monkeypatch.setattr(knn, "TEMPERATURE", 10.0)
    assert predictions(bank, labels, bank[:1], k=3).tolist() == [1]
    assert predictions(bank, labels, bank[:1], k=1).tolist() == [0]


def test_nearest_ignores_undecodable_images():
    bank, labels = random_set(20, 3)
    without = torch.arange(20) % 4 != 1
    expected = predictions(bank[without], labels[without], bank, k=5)
    assert torch.equal(predictions(bank, torch.where(without, labels, -1), bank, k=5), expected)


def test_nearest_of_a_large_bank_equals_a_sort_of_all():
    """Most blocks change few rows."""
    bank, labels = random_set(3000, 50, seed=1)
    queries, _ = random_set(20, 5, seed=2)
    bank, labels = torch.cat([bank, bank]), torch.cat([labels, labels.flip(0)])
    labels[::7] = -1
    blocks = list(zip(bank.split(64), labels.split(64), strict=True))
    cosines = torch.cat([queries @ features.T for features, _ in blocks], dim=1)
    every = to_keys(cosines.masked_fill(labels < 0, -torch.inf), labels.clamp_min(0))
    found = nearest(queries, blocks, k=30).sort(descending=True).values
    assert torch.equal(found, every.topk(30).values)


def test_nearest_replaces_an_equal_by_a_smaller_label():
    one = torch.tensor([[1.0, 0.0]])
    for labels in ([2, 1], [1, 2]):
        blocks = [(one, torch.tensor([label])) for label in labels]
        assert from_keys(nearest(one, blocks, k=1))[1].tolist() == [[1]]


def test_nearest_keeps_not_a_number():
    """Otherwise a broken network would look like one with far features."""
    bank, labels = random_set(200, 3, seed=1)
    blocks = [(bank[:150], labels[:150]), (torch.full_like(bank[150:], torch.nan), labels[150:])]
    cosines, _ = from_keys(nearest(bank[:4], blocks, k=5))
    assert cosines.isnan().all()


def test_vote_of_many_images_equals_each_alone():
    cosines = random_set(knn.VOTING + 9, 2, dim=7)[0]
    keys = to_keys(cosines, torch.tensor([0, 1, 2, 0, 1, 2, 1]))
    alone = torch.cat([vote(row, 5, 3) for row in keys.split(1)])
    assert torch.equal(vote(keys, 5, 3), alone) and len(alone.unique()) == 3


def test_nearest_of_equals_keeps_smaller_labels():
    """Otherwise copies of an image in two classes would depend on the workers that have them."""
    cosines, labels = torch.tensor([[0.5, 0.5, 0.5, 0.9]]), torch.tensor([2, 0, 1, 3])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        best, kept = from_keys(to_keys(cosines[:, order], labels[order]).topk(3).values)
        assert (best.tolist(), kept.tolist()) == ([[pytest.approx(0.9), 0.5, 0.5]], [[3, 0, 1]])


def test_keys_order_as_cosines_and_invert():
    cosines = torch.tensor([[-torch.inf, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.3, 1.0]])
    labels = torch.arange(9) * 1000
    keys = to_keys(cosines, labels)
    assert torch.equal(keys.sort().values, keys)
    assert all(
        torch.equal(*pair) for pair in zip(from_keys(keys), (cosines, labels[None]), strict=True)
    )


@pytest.mark.parametrize(
    ("m", "size", "expected"),
    [(7, 3, [3, 2, 2]), (2, 4, [1, 1, 0, 0]), (8, 2, [4, 4]), (5, 1, [5])],
)
def test_counts_cover_each_image_once(m, size, expected):
    assert counts(m, size) == expected


def bank_of(*sizes, unlabelled=0):
    """Return images of classes of these sizes, and some without a label."""
    labels = np.repeat([*range(len(sizes)), -1], [*sizes, unlabelled])
    return Images("DIR", [str(size) for size in sizes], Names.of(["x"] * len(labels)), labels, 0)


@pytest.mark.parametrize(
    ("bank", "k"),
    [
        (bank_of(50, 50), 50),
        (bank_of(10, 10, 9), 9),
        (bank_of(300, 300), 200),
        (bank_of(1280, 500, 120, 5, 1), 200),
        # A long tail: the smallest class would give 1, the largest 200.
        (bank_of(300, 60, 20, 5, 1), 77),
        (bank_of(30, 0, 0, 30), 30),  # classes without images do not count
        (bank_of(20, 20, unlabelled=1000), 20),
        (bank_of(1, 1), 1),
    ],
)
def test_choose_k_is_200_or_the_mean_class_size(bank, k):
    assert choose_k(bank, 0) == k


@pytest.mark.parametrize(("given", "k"), [(1, 1), (7, 7), (60, 60), (61, 60), (10**9, 60)])
def test_choose_k_limits_a_given_k(given, k):
    assert choose_k(bank_of(50, 10, unlabelled=5), given) == k
