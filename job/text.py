"""Text for people: printable, and short enough for a line."""

from collections.abc import Sequence


def printable(text: str) -> str:
    r"""Return `text` with escapes such as \x1b, \n and \u202e for unprintable characters.

    Names and contents of files can control a terminal otherwise.
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def plural(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 epoch" or "2 epochs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def first_names(names: Sequence[object], most: int = 8) -> str:
    """Return the first `most` names for a line, and "..." if there are more."""
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)
