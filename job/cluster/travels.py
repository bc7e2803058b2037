"""Which classes go from worker to worker; without Horovod, for modules that loader processes import."""

KINDS: list[type] = []


def travels(kind: type) -> type:
    """Let job/cluster/objects.py read objects of a class, attribute by attribute; it reads no others. A decorator."""
    KINDS.append(kind)
    return kind
