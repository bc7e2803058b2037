"""The order of shuffled batch norm: the positions that each worker encodes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moco import shuffle


@st.composite
def shuffles(draw):
    """Workers, parts of a worker's batch, images of a part, and a permutation of all images."""
    N, parts, b = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return N, parts, b, torch.tensor(draw(st.permutations(range(N * parts * b))))


@given(shuffles())
def test_order_has_each_image_once(case):
    N, parts, b, permutation = case
    rows = shuffle.order(permutation, N)
    assert rows.shape == (N, parts * b)
    assert rows.flatten().sort().values.tolist() == list(range(len(permutation)))
    for row, positions in zip(rows, permutation.split(parts * b), strict=True):
        assert row.tolist() == sorted(positions.tolist())


@given(shuffles())
def test_order_of_parts_divides_a_worker_s(case):
    """A worker's parts have exactly the worker's positions."""
    N, parts, _, permutation = case
    of_workers, of_parts = (shuffle.order(permutation, size) for size in (N, N * parts))
    assert torch.equal(of_parts.view(N, -1).sort(dim=1).values, of_workers)


@given(shuffles())
def test_order_does_not_change_permutation(case):
    N, _, _, permutation = case
    before = permutation.clone()
    shuffle.order(permutation, N)
    assert torch.equal(permutation, before)
