import pytest
import torch

from moco.queue import enqueue


class Ring:
    """A ring of K keys that takes them one by one."""

    def __init__(self, keys):
        self.keys, self.next = list(keys), 0

    def put(self, key):
        self.keys[self.next] = key
        self.next = (self.next + 1) % len(self.keys)


def start(dim, K, pointer=0):
    """A queue with a start of its own in every place, and the ring that models it."""
    queue = -torch.arange(1.0, dim * K + 1).view(K, dim).T.contiguous()
    ring = Ring(queue.T.tolist())
    ring.next = pointer
    return queue, torch.tensor([pointer]), ring


def batch(n, dim, step):
    return 1000.0 * (step + 1) + torch.arange(n * dim, dtype=torch.float32).view(n, dim)


SIZES = [(4, 12), (5, 12), (12, 12), (13, 12), (30, 12), (24, 12), (1, 7), (7, 1), (1, 1), (11, 12)]


@pytest.mark.parametrize(("n", "K"), SIZES)
@pytest.mark.parametrize("pointer", [0, 1, -1])
def test_queue_is_a_ring_that_takes_keys_one_by_one(n, K, pointer):
    queue, place, ring = start(3, K, pointer % K)
    for step in range(2 * K // n + 3):  # several times around
        keys = batch(n, 3, step)
        enqueue(queue, place, keys)
        for key in keys.tolist():
            ring.put(key)
        assert queue.T.tolist() == ring.keys
        assert place.tolist() == [ring.next]


def test_batches_of_changing_size_go_round_the_ring():
    queue, place, ring = start(2, 10)
    for step, n in enumerate([3, 8, 10, 1, 25, 0, 7, 20, 9]):
        keys = batch(n, 2, step)
        enqueue(queue, place, keys)
        for key in keys.tolist():
            ring.put(key)
        assert queue.T.tolist() == ring.keys
        assert place.tolist() == [ring.next]


def test_the_oldest_keys_go_first():
    queue, place = torch.zeros(1, 6), torch.zeros(1, dtype=torch.long)
    for step in range(5):
        enqueue(queue, place, torch.full((4, 1), step + 1.0))
    assert queue.sort().values.tolist() == [[4.0, 4.0, 5.0, 5.0, 5.0, 5.0]]


def test_queue_and_pointer_change_in_place_and_without_gradient():
    queue, place, _ = start(3, 8)
    addresses = queue.data_ptr(), place.data_ptr()
    keys = batch(5, 3, 0).requires_grad_()
    enqueue(queue, place, keys)
    assert (queue.data_ptr(), place.data_ptr()) == addresses
    assert not queue.requires_grad
    assert place.dtype == torch.int64
    assert place.shape == (1,)


def test_keys_take_the_type_of_the_queue():
    queue, place, _ = start(3, 8)
    keys = batch(5, 3, 0).bfloat16()
    enqueue(queue, place, keys)
    assert queue.dtype == torch.float32
    assert torch.equal(queue[:, :5], keys.float().T)


def test_the_keys_are_copied():
    queue, place, _ = start(3, 8)
    keys = batch(8, 3, 0)
    enqueue(queue, place, keys)
    before = queue.clone()
    keys.zero_()
    assert torch.equal(queue, before)
