"""Walk folders: find their images in an order that every machine agrees on."""

import errno
import os
from collections.abc import Iterator
from typing import NoReturn

from job.data.selection import Selection, is_leftover
from job.errors import RunError


def class_names(root: str, selection: Selection) -> list[str]:
    """Return the names of the class folders in `root`, sorted; count its other files.

    RunError: `root` cannot be read, or a link in it leads to no class folder.
    """
    try:
        with os.scandir(root) as found:
            entries = {entry.name: entry for entry in found}
    except OSError as error:
        refuse(error)
    classes = []
    for name in sorted(entries):
        if not selection.keeps(name, name):
            continue
        entry = entries[name]
        if entry.is_symlink() and (not os.path.exists(entry.path) or leads_back(entry.path, root)):
            raise dangling(entry.path)
        if entry.is_dir():
            classes.append(name)
        else:
            selection.left_out.add("outside the class folders", name)
    return classes


def images_below(
    root: str,
    top: str,
    selection: Selection,
    skipped: frozenset[str] = frozenset(),
    seen: set[str] | None = None,
) -> Iterator[list[str]]:
    """Yield the paths, from `root` on, of the images below its folder `top`, a list a folder.

    A folder's own images come first, then those of each folder in it. Links are followed, except
    back to a folder that they lie in, and twice to the same folder: none goes round in a loop.
    skipped: names in `top` that are neither walked nor counted.
    RunError: a folder, or the type of an entry, cannot be read. os.walk takes it for a file.
    """
    folder, seen = os.path.join(root, top), set() if seen is None else seen
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (folders if is_folder(entry) else files).append(entry.name)
    except OSError as error:
        refuse(error)
    if skipped:
        folders = [name for name in folders if name not in skipped]
        files = [name for name in files if name not in skipped]
    above = f"{top}/" if top else ""
    below = [name for name in sorted(folders) if selection.keeps(name, f"{above}{name}/")]
    yield selection.images(above, sorted(files))
    for name in below:
        if not leads_back(os.path.join(folder, name), folder):
            yield from images_below(root, f"{above}{name}", selection, seen=seen)


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one. OSError: its type cannot be read."""
    try:
        return entry.is_dir()
    except OSError as error:
        # A link to itself, or excluded anyway.
        if error.errno == errno.ELOOP or is_leftover(entry.name):
            return False
        raise


def leads_back(path: str, folder: str) -> bool:
    """Whether what lies in `folder` at `path` is a link to it, or to a folder above it."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return os.path.commonpath([target, os.path.realpath(folder)]) == target


def dangling(path: str) -> RunError:
    """Return the error of a link that leads to no folder, or back to one that it lies in."""
    problem = "which leads nowhere or back: fix it, or remove it"
    return RunError(f"{path} is a link to {os.readlink(path)}, {problem}")


def refuse(error: OSError) -> NoReturn:
    """RunError: a folder cannot be read."""
    advice = "see to its permissions, or move it away"
    raise RunError(f"cannot read {error.filename}: {error.strerror}; {advice}")
