"""Properties of the shuffle's way there and back; cases come from a seed, so that all workers try the same."""

import random

import torch

from job.cluster import comm
from job.cluster.objects import allgather
from moco.shuffle import Shuffle

CASES = 40


def cases():
    """Parts of a worker's batch, images of a part, their shape and type, and a permutation of the total batch."""
    draw = random.Random(0)
    for _ in range(CASES):
        parts, b = draw.randint(1, 3), draw.randint(1, 4)
        shape = [draw.randint(1, 3) for _ in range(draw.randint(0, 3))]
        dtype = draw.choice([torch.uint8, torch.float32, torch.int64])
        NB = comm.size() * parts * b
        yield parts, b, shape, dtype, torch.tensor(draw.sample(range(NB), NB))


def test_every_image_is_encoded_once_and_its_key_comes_back_to_its_place():
    wrong = []
    for parts, b, shape, dtype, permutation in cases():
        NB = len(permutation)
        total = (
            torch.arange(NB, dtype=dtype).view(-1, *[1] * len(shape)).expand(NB, *shape)
        )  # image i shows i everywhere
        shuffle = Shuffle(comm, permutation, parts)
        images = shuffle.receive(shuffle.send(total.chunk(comm.size())[comm.rank()]))
        seen = images.flatten(2)[:, :, 0] if shape else images  # (parts, b)
        keys = torch.stack(
            [seen.flatten().float(), torch.full((parts * b,), float(comm.rank()))], dim=1
        )
        back = shuffle.gather(shuffle.spread(keys))  # (NB, 2)
        encoder = torch.empty(NB)
        encoder[permutation] = torch.arange(comm.size()).repeat_interleave(parts * b).float()
        first = (comm.rank() * parts + torch.arange(parts)) * b
        mine = [sorted(permutation[start : start + b].tolist()) for start in first.tolist()]
        right = (
            torch.equal(images, seen.view(parts, b, *[1] * len(shape)).expand_as(images))
            and seen.tolist() == mine
        )
        if not (
            right and torch.equal(back, torch.stack([torch.arange(NB).float(), encoder], dim=1))
        ):
            wrong.append((parts, b, shape, dtype, permutation.tolist()))
    assert allgather(wrong, "wrong") == [[]] * comm.size()
