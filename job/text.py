"""Text for people: names of files, and what others wrote in them, may hold anything."""


def printable(text: str) -> str:
    r"""Return `text` with all that does not print written out: \x1b, \n, \u202e; nothing in it steers a terminal."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
