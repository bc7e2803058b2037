"""Files that are written whole, or stay what they were."""

import os

import pytest

from job.files import sync_folder, whole_file, write_whole


def test_a_file_that_is_there_is_replaced_at_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with whole_file(str(path)) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_whatever_goes_wrong_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "file"
    write_whole(str(path), b"before")
    with pytest.raises(error), whole_file(str(path)) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_a_place_that_takes_no_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(str(tmp_path / "missing" / "file"), b"")


def test_a_folder_that_cannot_be_synchronised_is_no_error(tmp_path):
    """As in /proc, whose folders refuse it like those of CIFS and of some FUSE file systems."""
    descriptor = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    sync_folder("/proc")
    sync_folder(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        sync_folder(str(tmp_path / "missing"))
