"""Shuffled batch norm: images are encoded on other workers, and their keys are sent back."""

from random import Random

import pytest
import torch

from job.cluster import comm
from job.cluster.objects import allgather
from moco.shuffle import Shuffle
from job.frameworks.moco import build_moco

B, CASES = 5, 40


def permutations():
    """Return permutations of the total batch: the identity, the reverse, and 20 random ones."""
    NB, generator = comm.size() * B, torch.Generator().manual_seed(3)
    return [
        torch.arange(NB),
        torch.arange(NB).flip(0),
        *(torch.randperm(NB, generator=generator) for _ in range(20)),
    ]


def received(images, shuffle):
    """Return the images that this worker encodes."""
    return shuffle.receive(shuffle.send(images))


@pytest.fixture(scope="module")
def exchanged():
    """The images that every worker received: [permutation][worker] (B, 3, 4, 4).

    Image i of the total batch has the value i in each pixel.
    """
    positions = torch.arange(comm.rank() * B, (comm.rank() + 1) * B, dtype=torch.uint8)
    mine = positions.view(B, 1, 1, 1).expand(B, 3, 4, 4)
    batches = [received(mine, Shuffle(comm, permutation))[0] for permutation in permutations()]
    return [allgather(images, f"received.{i}") for i, images in enumerate(batches)]


def test_worker_receives_its_images_of_the_permutation(exchanged):
    """Each image reaches one worker, with all its bytes, and a worker receives B images."""
    for permutation, workers in zip(permutations(), exchanged, strict=True):
        for images, positions in zip(workers, permutation.split(B), strict=True):
            assert images.dtype == torch.uint8 and images.shape == (B, 3, 4, 4)
            assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
            assert images[:, 0, 0, 0].tolist() == sorted(positions.tolist())


def test_micro_batches_follow_the_permutation():
    """Micro-batches of one image have the order of the permutation."""
    mine = torch.arange(comm.rank() * B, (comm.rank() + 1) * B).view(B, 1)
    batches = [received(mine, Shuffle(comm, each, B)).flatten().tolist() for each in permutations()]
    workers = zip(*allgather(batches, "parts"), strict=True)
    assert [sum(each, []) for each in workers] == [each.tolist() for each in permutations()]


@pytest.mark.parametrize("parts", [1, B])
def test_keys_return_in_the_order_of_the_batch(parts):
    """The encoder is the identity: a key is its image, two numbers that give the position."""
    positions = torch.arange(comm.size() * B, dtype=torch.float32)
    total = torch.stack([positions, -positions], dim=1)  # (NB, 2)
    mine = total[comm.rank() * B : (comm.rank() + 1) * B]
    returned = []
    for permutation in permutations():
        shuffle = Shuffle(comm, permutation, parts)
        received = shuffle.receive(shuffle.send(mine))
        returned.append(shuffle.gather(shuffle.spread(received.flatten(0, 1))))
    same = allgather([torch.equal(keys, total) for keys in returned], "same")
    assert all(all(worker) for worker in same)


def test_images_are_sent_once_a_step_as_bytes(monkeypatch):
    sent, begin_exchange = [], comm.begin_exchange

    def recorded(tensor, *arguments):
        sent.append((tensor.dtype, tuple(tensor.shape)))
        return begin_exchange(tensor, *arguments)

    monkeypatch.setattr(comm, "begin_exchange", recorded)
    views = torch.zeros(2, B, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        moco = build_moco(comm, "resnet18", dim=4, K=8)
        moco(views[0], moco.keys(views[1], permutations()[-1]))
    assert allgather(sent, "sent") == [[(torch.uint8, (B, 3, 32, 32))]] * comm.size()


def cases():
    """Yield micro-batches a worker, their size, image shape and type, and a permutation (NB,).

    The cases are from a seed, so all workers try the same.
    """
    draw = Random(0)
    for _ in range(CASES):
        parts, b = draw.randint(1, 3), draw.randint(1, 4)
        shape = [draw.randint(1, 3) for _ in range(draw.randint(0, 3))]
        dtype = draw.choice([torch.uint8, torch.float32, torch.int64])
        NB = comm.size() * parts * b
        yield parts, b, shape, dtype, torch.tensor(draw.sample(range(NB), NB))


def test_random_shuffles_return_each_key_to_its_image():
    """Any split, shape and type: each image is encoded once, by the worker of the permutation."""
    wrong = []
    for parts, b, shape, dtype, permutation in cases():
        NB = len(permutation)
        # Image i has the value i in each pixel.
        total = torch.arange(NB, dtype=dtype).view(-1, *[1] * len(shape)).expand(NB, *shape)
        shuffle = Shuffle(comm, permutation, parts)
        images = shuffle.receive(shuffle.send(total.chunk(comm.size())[comm.rank()]))
        seen = images.flatten(2)[:, :, 0] if shape else images  # (parts, b)
        keys = torch.stack(
            [seen.flatten().float(), torch.full((parts * b,), float(comm.rank()))], dim=1
        )
        gathered = shuffle.gather(shuffle.spread(keys))  # (NB, 2)
        ranks = torch.empty(NB)
        ranks[permutation] = torch.arange(comm.size()).repeat_interleave(parts * b).float()
        first = (comm.rank() * parts + torch.arange(parts)) * b
        mine = [sorted(permutation[start : start + b].tolist()) for start in first.tolist()]
        right = (
            torch.equal(images, seen.view(parts, b, *[1] * len(shape)).expand_as(images))
            and seen.tolist() == mine
        )
        expected = torch.stack([torch.arange(NB).float(), ranks], dim=1)
        if not (right and torch.equal(gathered, expected)):
            wrong.append((parts, b, shape, dtype, permutation.tolist()))
    assert allgather(wrong, "wrong") == [[]] * comm.size()
