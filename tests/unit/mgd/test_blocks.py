"""Blocks of images that fit a cache: they change neither reduced maps nor the loss."""

import pytest
import torch

from mgd import blocks as module
from mgd.blocks import blocks
from mgd.loss import partial_l2
from mgd.reducers import REDUCERS


@pytest.mark.parametrize("numbers", [1, 60, 130, 2**18])
def test_blocks_have_all_images_in_order(numbers, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", numbers)
    teacher, student = torch.randn(7, 5, 4, 3), torch.randn(7, 2, 4, 3)
    pairs = list(blocks(teacher, student))
    assert torch.equal(torch.cat([t for t, _ in pairs]), teacher)
    assert torch.equal(torch.cat([s for _, s in pairs]), student)
    assert all(len(t) == len(s) and (len(t) == 1 or t.numel() <= numbers) for t, s in pairs)
    assert len(pairs) == {1: 7, 60: 7, 130: 4, 2**18: 1}[numbers]


@pytest.mark.parametrize("name", ["amp", "sp", "sm"])
def test_reduced_maps_are_equal_in_any_blocks(name, monkeypatch):
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 8, 3, 4, generator=random).to(memory_format=torch.channels_last)
    matching = torch.randperm(8, generator=random).view(-1, 8 if name == "sm" else 4)
    in_one_block, _ = REDUCERS[name](teacher, torch.zeros(8), matching)
    monkeypatch.setattr(module, "NUMBERS", 200)
    in_blocks, _ = REDUCERS[name](teacher, torch.zeros(8), matching)
    assert torch.equal(in_one_block, in_blocks)


def test_loss_is_close_in_any_blocks(monkeypatch):
    def loss_and_gradient():
        student = torch.randn(
            5, 4, 3, 2, generator=torch.Generator().manual_seed(1), requires_grad=True
        )
        loss = partial_l2(
            student,
            torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(2)),
            -torch.rand(4),
        )
        loss.backward()
        return loss, student.grad

    torch.manual_seed(3)
    in_one_block = loss_and_gradient()
    monkeypatch.setattr(module, "NUMBERS", 48)
    torch.manual_seed(3)
    in_blocks = loss_and_gradient()
    torch.testing.assert_close(in_one_block[0], in_blocks[0], rtol=1e-6, atol=0)  # rounding differs
    assert torch.equal(in_one_block[1], in_blocks[1])
