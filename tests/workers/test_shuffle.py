import pytest
import torch

from job.cluster import comm
from job.cluster.objects import allgather
from moco.shuffle import Shuffle
from job.frameworks.moco import build_moco

B = 5


def permutations():
    """Of the total batch: every image stays, all go to the other end, and random ones."""
    NB, generator = comm.size() * B, torch.Generator().manual_seed(3)
    return [
        torch.arange(NB),
        torch.arange(NB).flip(0),
        *(torch.randperm(NB, generator=generator) for _ in range(20)),
    ]


def received(images, shuffle):
    """The images that this worker encodes."""
    return shuffle.receive(shuffle.send(images))


@pytest.fixture(scope="module")
def travelled():
    """For each permutation the images that every worker received; image i of the total batch shows i in each pixel."""
    mine = (
        torch.arange(comm.rank() * B, (comm.rank() + 1) * B, dtype=torch.uint8)
        .view(B, 1, 1, 1)
        .expand(B, 3, 4, 4)
    )
    found = [received(mine, Shuffle(comm, permutation))[0] for permutation in permutations()]
    return [allgather(images, f"received.{i}") for i, images in enumerate(found)]


def test_every_image_reaches_exactly_one_worker_and_whole(travelled):
    for workers in travelled:
        images = torch.cat(workers)
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
        assert images[:, 0, 0, 0].sort().values.tolist() == list(range(comm.size() * B))


def test_a_worker_receives_the_images_that_the_permutation_gives_it(travelled):
    for permutation, workers in zip(permutations(), travelled, strict=True):
        for images, positions in zip(workers, permutation.split(B), strict=True):
            assert images[:, 0, 0, 0].tolist() == sorted(positions.tolist())


def test_a_part_of_a_worker_is_what_a_worker_of_its_own_would_encode():
    """With as many parts as images each is alone: in the order of the permutation, not of the images that came."""
    mine = torch.arange(comm.rank() * B, (comm.rank() + 1) * B).view(B, 1)
    parts = [
        received(mine, Shuffle(comm, permutation, B)).flatten() for permutation in permutations()
    ]
    found = allgather([images.tolist() for images in parts], "parts")
    assert [sum(workers, []) for workers in zip(*found, strict=True)] == [
        permutation.tolist() for permutation in permutations()
    ]


def test_a_worker_receives_the_bytes_of_one_batch_whatever_the_number_of_workers(travelled):
    for workers in travelled:
        assert all(
            images.dtype == torch.uint8 and images.shape == (B, 3, 4, 4) for images in workers
        )


@pytest.mark.parametrize("parts", [1, B])
def test_keys_come_back_in_the_order_of_the_batch(parts):
    """The encoder is the identity: a key is its image, two numbers that say the position."""
    positions = torch.arange(comm.size() * B, dtype=torch.float32)
    total = torch.stack([positions, -positions], dim=1)  # (NB, 2)
    mine = total[comm.rank() * B : (comm.rank() + 1) * B]
    returned = []
    for permutation in permutations():
        shuffle = Shuffle(comm, permutation, parts)
        received = shuffle.receive(shuffle.send(mine))
        returned.append(shuffle.gather(shuffle.spread(received.flatten(0, 1))))
    found = allgather([torch.equal(keys, total) for keys in returned], "found")
    assert all(all(worker) for worker in found)


def test_the_keys_images_travel_once_a_step_and_as_bytes(monkeypatch):
    sent, begin_exchange = [], comm.begin_exchange

    def recorded(tensor, *arguments):
        sent.append((tensor.dtype, tuple(tensor.shape)))
        return begin_exchange(tensor, *arguments)

    monkeypatch.setattr(comm, "begin_exchange", recorded)
    views = torch.zeros(2, B, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        moco = build_moco(comm, "resnet18", dim=4, K=8)
        moco(views[0], moco.keys(views[1], permutations()[-1]))
    found = allgather(sent, "sent")
    assert found == [[(torch.uint8, (B, 3, 32, 32))]] * comm.size()
