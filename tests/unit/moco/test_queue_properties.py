from collections import deque

import torch
from hypothesis import given
from hypothesis import strategies as st

from moco.queue import enqueue

RINGS = st.integers(1, 9)


@given(K=RINGS, start=st.integers(0, 8), batches=st.lists(st.integers(0, 25), max_size=8))
def test_a_queue_holds_the_last_keys_in_the_order_of_their_coming(K, start, batches):
    """As a deque of K does, from the pointer on, whatever the sizes of the batches."""
    queue, pointer = -1.0 - torch.arange(2 * K).view(2, K), torch.tensor([start % K])
    model = deque(queue.roll(-start % K, dims=1).T.tolist(), maxlen=K)
    came = 0
    for n in batches:
        keys = torch.arange(came, came + n).view(-1, 1) + torch.tensor([0.0, 0.5])  # (n, 2)
        enqueue(queue, pointer, keys)
        model.extend(keys.tolist())
        came += n
        assert pointer.tolist() == [(start + came) % K]
        assert queue.roll(-pointer.item(), dims=1).T.tolist() == list(model)


@given(K=RINGS, start=st.integers(0, 8), n=st.integers(0, 30), data=st.data())
def test_a_batch_may_come_in_parts(K, start, n, data):
    keys, cut = torch.rand(n, 3), data.draw(st.integers(0, n))
    whole, parts = ((torch.zeros(3, K), torch.tensor([start % K])) for _ in range(2))
    enqueue(*whole, keys)
    for part in (keys[:cut], keys[cut:]):
        enqueue(*parts, part)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
