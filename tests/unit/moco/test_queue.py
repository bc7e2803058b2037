"""The queue of keys: a ring that always has the last K keys."""

from collections import deque

import torch
from hypothesis import given
from hypothesis import strategies as st

from moco.queue import enqueue


def new(dim=3, K=8):
    """Return a queue (dim, K) with different values, and its pointer."""
    return -torch.arange(1.0, dim * K + 1).view(K, dim).T.contiguous(), torch.tensor([0])


def batch(n, dim=3):
    return 1000.0 + torch.arange(n * dim, dtype=torch.float32).view(n, dim)


@given(
    K=st.integers(1, 12),
    start=st.integers(0, 11),
    batches=st.lists(st.integers(0, 30), max_size=12),
)
def test_enqueue_keeps_last_keys_in_order(K, start, batches):
    """Like a deque of K keys from the pointer on, for batches of any sizes."""
    queue, pointer = -1.0 - torch.arange(2 * K).view(2, K), torch.tensor([start % K])
    model = deque(queue.roll(-start % K, dims=1).T.tolist(), maxlen=K)
    total = 0
    for n in batches:
        keys = torch.arange(total, total + n).view(-1, 1) + torch.tensor([0.0, 0.5])  # (n, 2)
        enqueue(queue, pointer, keys)
        model.extend(keys.tolist())
        total += n
        assert pointer.tolist() == [(start + total) % K]
        assert queue.roll(-pointer.item(), dims=1).T.tolist() == list(model)


def test_enqueue_is_in_place_without_gradient():
    queue, pointer = new()
    addresses = queue.data_ptr(), pointer.data_ptr()
    enqueue(queue, pointer, batch(5).requires_grad_())
    assert (queue.data_ptr(), pointer.data_ptr()) == addresses
    assert not queue.requires_grad
    assert pointer.dtype == torch.int64
    assert pointer.shape == (1,)


def test_enqueue_converts_to_dtype_of_queue():
    queue, pointer = new()
    keys = batch(5).bfloat16()
    enqueue(queue, pointer, keys)
    assert queue.dtype == torch.float32
    assert torch.equal(queue[:, :5], keys.float().T)


def test_enqueue_copies_keys():
    queue, pointer = new()
    keys = batch(8)
    enqueue(queue, pointer, keys)
    before = queue.clone()
    keys.zero_()
    assert torch.equal(queue, before)
