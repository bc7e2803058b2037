"""A folder's files are chosen at a glance as one by one."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.selection import LEFTOVERS, Selection

ODD = ["png", ".png", "..png", "...png", "a.", "a..png", "a.b.PNG", "a.PnG", "a.png.part", "a.Jpeg"]
ODD += [".a.JPEG", "a", "a b.gif", "\udcff.webp", "a.JPG\n", *LEFTOVERS]
NAMES = st.lists(st.sampled_from(ODD) | st.text("aB._ pngJ", min_size=1, max_size=8), max_size=9)


def one_by_one(above, names):
    """Paths, number and tally, as `keeps` and `takes` have them for each file."""
    selection = Selection()
    paths = [above + name for name in names if selection.keeps(name, above + name)]
    return [path for path in paths if selection.takes(path)], selection.taken, selection


@given(NAMES, st.sampled_from(["", "class/", ".hidden/"]))
def test_images_of_a_folder_are_those_that_each_name_shows(names, above):
    selection = Selection()
    paths = selection.images(above, names)
    expected, taken, reference = one_by_one(above, names)
    assert (paths, selection.taken) == (expected, taken)
    assert {kind: count for kind, (count, _) in selection.left_out.kinds.items()} == {
        kind: count for kind, (count, _) in reference.left_out.kinds.items()
    }


@pytest.mark.parametrize("name", sorted(LEFTOVERS))
def test_no_leftover_has_an_image_s_ending(name):
    assert os.path.splitext(name)[1] not in Selection().endings
