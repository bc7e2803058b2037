"""The selection of images among a folder's files."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.selection import LEFTOVERS, Selection

ODD = ["png", ".png", "..png", "...png", "a.", "a..png", "a.b.PNG", "a.PnG", "a.png.part", "a.Jpeg"]
ODD += [".a.JPEG", "a", "a b.gif", "\udcff.webp", "a.JPG\n", *LEFTOVERS]
NAMES = st.lists(st.sampled_from(ODD) | st.text("aB._ pngJ", min_size=1, max_size=8), max_size=9)


def one_by_one(above, names):
    """Return paths, number and tally, with a call of `keeps` and `takes` for each file."""
    selection = Selection()
    paths = [above + name for name in names if selection.keeps(name, above + name)]
    return [path for path in paths if selection.takes(path)], selection.taken, selection


@given(NAMES, st.sampled_from(["", "class/", ".hidden/"]))
def test_selection_fast_path_equals_the_slow_one(names, above):
    selection = Selection()
    paths = selection.images(above, names)
    expected, count, reference = one_by_one(above, names)
    assert (paths, selection.taken) == (expected, count)
    assert {kind: count for kind, (count, _) in selection.left_out.kinds.items()} == {
        kind: count for kind, (count, _) in reference.left_out.kinds.items()
    }


@pytest.mark.parametrize("name", sorted(LEFTOVERS))
def test_leftovers_end_in_no_image_ending(name):
    assert os.path.splitext(name)[1] not in Selection().endings
