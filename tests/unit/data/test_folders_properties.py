"""Which images a worker takes, of folders and of shards."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.folders import ImageFolder, TrainingOrder, every_nth_batch
from job.data.shards import PackedImages, save_index
from job.data.tars import Shard


@pytest.fixture(scope="module")
def images_of(tmp_path_factory):
    """A function from the sizes of shards to as many images, packed in such shards; or in a folder, from a number."""
    root = tmp_path_factory.mktemp("packed")

    def make(sizes):
        if isinstance(sizes, int):
            return ImageFolder(
                "root",
                ["a"],
                [f"a/{number}.png" for number in range(sizes)],
                [0] * sizes,
                max_bad=0,
            )
        shards = [
            Shard(
                f"{n}.tar",
                0,
                [0] * size,
                [0] * size,
                [0] * size,
                [f"a/{n}-{k}.png" for k in range(size)],
            )
            for n, size in enumerate(sizes)
        ]
        for shard in shards:
            open(os.path.join(root, shard.name), "wb").close()
        save_index(str(root), ["a"], shards)
        return PackedImages(str(root), max_bad=0)

    return make


SHARDS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)
SIZES = st.integers(1, 80) | SHARDS


@st.composite
def settings(draw):
    """Images, and what an order is made of: a total batch that N workers share, a seed, epochs."""
    N, share = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return (
        draw(SIZES),
        N,
        dict(total=N * share, seed=draw(st.integers(0, 2**63 - 1)), epochs=draw(st.integers(1, 3))),
    )


@given(setting=settings())
def test_the_shares_of_all_workers_are_the_batches_of_one(images_of, setting):
    sizes, N, setting = setting
    images = images_of(sizes)
    whole = list(TrainingOrder(images, rank=0, size=1, **setting))
    shares = [TrainingOrder(images, rank=rank, size=N, **setting) for rank in range(N)]
    assert all(len(share) == len(whole) for share in shares)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part) for part in parts] == [len(batch) // N] * N
        assert sum(parts, []) == batch


@given(setting=settings())
def test_an_epoch_is_whole_batches_of_different_images(images_of, setting):
    sizes, _, setting = setting
    images, total = images_of(sizes), setting["total"]
    batches = list(TrainingOrder(images, rank=0, size=1, **setting))
    steps = len(images) // total  # those that are left over are fewer than a batch
    assert len(batches) == steps * setting["epochs"]
    for epoch in range(setting["epochs"]):
        shown = sum(batches[epoch * steps : (epoch + 1) * steps], [])
        assert {e for e, _ in shown} <= {epoch}
        assert len({index for _, index in shown}) == steps * total
        assert all(0 <= index < len(images) for _, index in shown)


@given(setting=settings(), data=st.data())
def test_a_run_that_starts_anywhere_goes_on_with_the_tail(images_of, setting, data):
    sizes, N, setting = setting
    images, rank = images_of(sizes), data.draw(st.integers(0, N - 1))
    whole, steps = (
        list(TrainingOrder(images, rank=rank, size=N, **setting)),
        len(images) // setting["total"],
    )
    start = (
        data.draw(st.integers(0, setting["epochs"])),
        data.draw(st.integers(0, max(0, steps - 1))),
    )
    order = TrainingOrder(images, rank=rank, size=N, start=start, **setting)
    tail = whole[start[0] * steps + start[1] :]
    assert list(order) == tail
    assert len(order) == len(tail)


@given(
    sizes=SIZES,
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    total=st.integers(1, 40),
)
def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch(
    images_of, sizes, seed, epoch, total
):
    one, other = images_of(sizes), images_of(sizes)
    other.order(seed, epoch + 1, total)
    assert np.array_equal(one.order(seed, epoch, total), other.order(seed, epoch, total))
    assert one.digest(seed, epoch, total) == other.digest(seed, epoch, total)


@given(
    images=st.lists(st.integers(0, 10**6), max_size=60),
    batch=st.integers(1, 9),
    size=st.integers(1, 7),
)
def test_measuring_is_shared_in_batches_that_do_not_depend_on_the_workers(images, batch, size):
    shares = [every_nth_batch(images, batch, rank, size) for rank in range(size)]
    count = max(map(len, shares))
    in_turn = [share[turn] for turn in range(count) for share in shares if turn < len(share)]
    assert in_turn == every_nth_batch(images, batch, 0, 1)
    assert sum(in_turn, []) == images
