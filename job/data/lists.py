"""Lists of images: a text file with a path a line."""

import io
import os

from job.data.image_files import ImageList
from job.data.selection import Selection
from job.data.walk import refuse
from job.errors import RunError
from job.files import open_regular
from job.text import printable

LARGEST_LIST = 2**30  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXPECTED = "a folder of images, or a text file with a path a line"


def read_list(path: str, max_bad: int = 0) -> ImageList:
    """Return the images of a list. Blank lines and lines that begin with # have no effect.

    Files without an image's ending are left out and counted. A path twice is two images.
    RunError: the list is unreadable, has no image, or names a missing file.
    """
    selection = Selection()
    lines = [(number, line) for number, line in listed(path) if selection.takes(line)]
    if not lines:
        raise RunError(f"no images in {path}: {selection.report(path) or f'expected {EXPECTED}'}")
    base = os.path.dirname(path)
    names: dict[str, set[str]] = {}
    for folder, name in (split(line) for _, line in lines):
        names.setdefault(folder, set()).add(name)
    for folder, some in names.items():
        some -= files_in(os.path.join(base, folder), some)  # the missing ones remain
    missing = [item for item in lines if is_among(names, item[1])]
    if missing:
        number, line = missing[0]
        raise RunError(
            f"{path}: {len(missing)} of {len(lines)} paths lead to no file, such as"
            f" {printable(line)} in line {number}; expected paths from {base or '.'} on, or"
            " absolute paths. Fix these lines, or remove them"
        )
    images = ImageList(path, [line for _, line in lines], max_bad)
    images.left_out = selection.report(path)
    return images


def listed(path: str) -> list[tuple[int, str]]:
    """Return a list's lines that name a file, with their numbers. RunError: it is not a text."""
    try:
        with open_regular(path, LARGEST_LIST) as file:
            content = file.read()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; expected {EXPECTED}") from None
    if b"\0" in content:
        advice = ". Put a tar file into a folder: python -m job.pack --index FOLDER"
        tar = path.lower().endswith((".tar", ".tar.gz", ".tgz"))
        raise RunError(f"{path} is not a text file; expected {EXPECTED}{advice if tar else ''}")
    lines = io.BytesIO(content.removeprefix(BYTE_ORDER_MARK))
    numbered = enumerate((os.fsdecode(line.strip()) for line in lines), 1)
    return [(number, line) for number, line in numbered if line and line[0] != "#"]


def files_in(folder: str, names: set[str]) -> set[str]:
    """Return the names that are files in a folder, or an empty set if it is missing.

    One listing finds many files. Other entries are ignored: a link among them can be broken.
    RunError: the folder, or one of the files, cannot be read.
    """
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.name in names and entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        refuse(error)


def is_among(names: dict[str, set[str]], path: str) -> bool:
    """Return whether a path is one of {folder with a slash behind it: names}."""
    folder, name = split(path)
    return name in names[folder]


def split(path: str) -> tuple[str, str]:
    """Return a path's folder, with a slash behind it if there is one, and its name."""
    cut = path.rfind("/") + 1
    return path[:cut], path[cut:]
