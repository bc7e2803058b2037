"""Select the images among the files of a folder or a tar file, and count the files left out."""

import os

from job.data import plugins
from job.data.images import readable_endings
from job.text import printable

# Files of systems and tools, in addition to names that begin with a dot. In lower case.
LEFTOVERS = {
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
    "lost+found",
    "$recycle.bin",
}
LEFTOVERS |= {"system volume information", "thumbs.db", "desktop.ini"}
SHOWN = 5  # kinds in a line


def is_leftover(name: str) -> bool:
    """Return whether a system or a tool left a file or folder of this name behind."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in LEFTOVERS


class Tally:
    """The number of files of each kind, and the first of them."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str) -> None:
        """Count a file."""
        count, first = self.kinds.get(kind, (0, example))
        self.kinds[kind] = count + 1, first

    @property
    def total(self) -> int:
        """All files."""
        return sum(count for count, _ in self.kinds.values())

    def __str__(self) -> str:
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1][0])
        parts = [
            f"{count} {kind} (such as {printable(first)})" for kind, (count, first) in kinds[:SHOWN]
        ]
        if rest := sum(count for _, (count, _) in kinds[SHOWN:]):
            parts.append(f"{rest} of {len(kinds) - SHOWN} other kinds")
        return ", ".join(parts)


class Selection:
    """Counts of the images selected, the files left out, and the images without a label."""

    def __init__(self) -> None:
        self.endings = readable_endings()
        # As most files spell them, without the dot. No name of LEFTOVERS ends in one.
        self.spelt = {each[1:] for ending in self.endings for each in (ending, ending.upper())}
        self.taken = 0
        self.left_out, self.unlabelled = Tally(), Tally()

    def takes(self, path: str) -> bool:
        """Return whether a file is an image by its ending, and count it."""
        if self.is_image(path):
            self.taken += 1
            return True
        ending = os.path.splitext(path)[1].lower()
        self.left_out.add(ending or "without an ending", path)
        return False

    def is_image(self, path: str) -> bool:
        """Return whether a file's ending is an image's."""
        return os.path.splitext(path)[1].lower() in self.endings

    def images(self, above: str, names: list[str]) -> list[str]:
        """Return the paths of the images among a folder's files, and count its files.

        above: the folder's path and a slash, or "". A million files need half a second, because
        for most of them one test of the ending is enough.
        """
        paths, spelt = [], self.spelt
        for name in names:
            stem, _, ending = name.rpartition(".")
            if stem and stem[0] != "." and ending in spelt:
                paths.append(above + name)
            elif self.keeps(name, path := above + name) and self.takes(path):
                paths.append(path)
                self.taken -= 1
        self.taken += len(paths)
        return paths

    def keeps(self, name: str, path: str) -> bool:
        """Return whether a file or folder is not a leftover. Count a leftover."""
        if is_leftover(name):
            self.left_out.add("hidden or of the system", path)
            return False
        return True

    def report(self, root: str) -> str:
        """Return a line about the files left out of `root`, or "" without such."""
        total = self.left_out.total
        if not total:
            return ""
        line = f"left out {total} of {total + self.taken} files in {root}: {self.left_out}"
        return line + plugins.advice(self.left_out.kinds)
