"""Files that are replaced completely or not at all, and folders that are synchronised."""

import os

import pytest

from job.files import sync_folder, whole_file, write_whole


def test_whole_file_replaces_atomically(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with whole_file(str(path)) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_whole_file_keeps_the_old_file_after_an_error(tmp_path, error):
    path = tmp_path / "file"
    write_whole(str(path), b"before")
    with pytest.raises(error), whole_file(str(path)) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_write_whole_raises_for_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(str(tmp_path / "missing" / "file"), b"")


def test_sync_folder_ignores_folders_without_fsync(tmp_path):
    """Folders in /proc refuse fsync, as those on CIFS and some FUSE file systems do."""
    descriptor = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    sync_folder("/proc")
    sync_folder(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        sync_folder(str(tmp_path / "missing"))
