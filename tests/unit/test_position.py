"""The count of optimizer steps over resumes that change the steps of an epoch."""

from hypothesis import given
from hypothesis import strategies as st

from job.position import Count, change, resumed


def checkpoint(epoch, images, batch_size, **more):
    """Return the fields of a checkpoint that the count needs."""
    return {
        "epoch": epoch,
        "step": 0,
        "images": images,
        "config": {"batch_size": batch_size},
        **more,
    }


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(8, 99), st.integers(1, 8)), max_size=5))
def test_count_counts_each_step_once_over_resumes(intervals):
    """An interval between resumes is (epochs, images, batch size)."""
    counted, first, saved = [], 0, None
    for epochs, images, batch_size in intervals:
        steps = images // batch_size
        count = resumed(saved, steps) if saved else Count(steps)
        last = first + epochs
        counted += [count.at(epoch, step) for epoch in range(first, last) for step in range(steps)]
        saved, first = checkpoint(last, images, batch_size, steps=count.at(last, 0)), last
    assert counted == list(range(len(counted)))


def test_resumed_derives_the_count_of_old_checkpoints():
    assert resumed(checkpoint(3, 50, 8), 12).at(3, 0) == 3 * 6
    assert resumed(checkpoint(3, 50, 8) | {"step": 5}, 6) == Count(6)


def test_change_is_empty_for_the_same_batch():
    assert change(checkpoint(3, 50, 8), 8, 6) == {}
    assert change(checkpoint(3, 50, 8), 7, 7)["steps_an_epoch_before"] == 6
    assert change(checkpoint(3, 50, 8), 7, 6)["batch_size_before"] == 8
