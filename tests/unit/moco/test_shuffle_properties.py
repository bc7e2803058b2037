import torch
from hypothesis import given
from hypothesis import strategies as st

from moco import shuffle


@st.composite
def shuffles(draw):
    """Workers, parts of a worker's batch, images of a part, and a permutation of all."""
    N, parts, b = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return N, parts, b, torch.tensor(draw(st.permutations(range(N * parts * b))))


@given(shuffles())
def test_every_image_is_encoded_once_by_the_worker_to_which_the_permutation_gives_it(case):
    N, parts, b, permutation = case
    rows = shuffle.order(permutation, N)
    assert rows.shape == (N, parts * b)
    assert rows.flatten().sort().values.tolist() == list(range(len(permutation)))
    for row, given_to in zip(rows, permutation.split(parts * b), strict=True):
        assert row.tolist() == sorted(given_to.tolist())


@given(shuffles())
def test_parts_are_encoded_as_by_so_many_workers_of_their_own(case):
    """A worker's parts share out what is the worker's, and nothing else."""
    N, parts, _, permutation = case
    whole, divided = shuffle.order(permutation, N), shuffle.order(permutation, N * parts)
    assert torch.equal(divided.view(N, -1).sort(dim=1).values, whole)


@given(shuffles())
def test_the_permutation_is_not_changed(case):
    N, _, _, permutation = case
    before = permutation.clone()
    shuffle.order(permutation, N)
    assert torch.equal(permutation, before)
