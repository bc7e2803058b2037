"""Register the classes whose objects workers can send each other.

It does not import Horovod, because loader processes import modules with such classes.
"""

KINDS: list[type] = []


def travels(kind: type) -> type:
    """Let job/cluster/objects.py load objects of a class, by their attributes. A decorator."""
    KINDS.append(kind)
    return kind
