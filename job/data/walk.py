"""Walk folders: find their images in an order that every machine agrees on."""

import errno
import os
from collections.abc import Iterator
from typing import NoReturn

from job.data.selection import Selection, is_leftover
from job.errors import RunError

SAME = "the same folder as another"


def class_names(root: str, selection: Selection) -> list[str]:
    """Return the sorted names of the class folders in `root`, and count its other files.

    RunError: `root` cannot be read, or a link in it does not lead to a class folder.
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
    home: str = "",
) -> Iterator[list[str]]:
    """Yield the paths, from `root` on, of the images below its folder `top`, a list a folder.

    A folder's own images come first, then the images of each folder in it. Links are followed,
    except back to a folder that contains them, and twice to the same folder. So no walk loops.
    If `top` is empty, links to other folders below `root` are not followed either, because each
    image has the label of the folder that contains it.
    skipped: names in `top` that are neither walked nor counted. seen, home: of the walk so far.
    RunError: a folder, or the type of an entry, cannot be read (os.walk would treat it as a file).
    Also if `top` is empty, and a link in `root` that is not to an image is broken.
    """
    folder, seen = os.path.join(root, top), set() if seen is None else seen
    real = os.path.realpath(folder)
    if real in seen:
        selection.left_out.add(SAME, f"{top}/")
        return
    seen.add(real)
    folders: list[str] = []
    files: list[str] = []
    links: set[str] = set()  # to folders, or without an image's ending
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (kind := folders if is_folder(entry) else files).append(entry.name)
                if entry.is_symlink() and (kind is folders or not selection.is_image(entry.name)):
                    links.add(entry.name)
    except OSError as error:
        refuse(error)
    if not top:
        home = real
        check_links(folder, links)
    if skipped:
        folders = [name for name in folders if name not in skipped]
        files = [name for name in files if name not in skipped]
    above = f"{top}/" if top else ""
    below = [name for name in sorted(folders) if selection.keeps(name, f"{above}{name}/")]
    yield selection.images(above, sorted(files))
    for name in below:
        path = os.path.join(folder, name)
        if name in links and leads_back(path, folder):
            continue
        if name in links and home and leads_within(path, home):
            selection.left_out.add(SAME, f"{above}{name}/")
            continue
        yield from images_below(root, f"{above}{name}", selection, seen=seen, home=home)


def check_links(folder: str, names: set[str]) -> None:
    """RunError: one of a folder's links that are not images is broken.

    It may have led to a folder, whose images would be missing.
    """
    for name in sorted(names):
        path = os.path.join(folder, name)
        if not is_leftover(name) and not os.path.exists(path):
            raise dangling(path)


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
    """Whether `path` in `folder` is a link to `folder`, or to a folder above it."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return os.path.commonpath([target, os.path.realpath(folder)]) == target


def leads_within(path: str, home: str) -> bool:
    """Whether a link leads to a folder below `home`, a real path, whose walk finds its images."""
    target = os.path.realpath(path)
    if os.path.commonpath([target, home]) != home:
        return False
    return not any(map(is_leftover, os.path.relpath(target, home).split(os.sep)))


def dangling(path: str) -> RunError:
    """Return the error of a broken link, or one back to a folder that contains it."""
    problem = "which leads nowhere or back: fix it, or remove it"
    return RunError(f"{path} is a link to {os.readlink(path)}, {problem}")


def refuse(error: OSError) -> NoReturn:
    """RunError: a folder cannot be read."""
    fix = "Fix its permissions, or move it away"
    raise RunError(f"cannot read {error.filename}: {error.strerror}. {fix}")
