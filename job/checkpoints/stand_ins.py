"""Inert stand-ins for the objects in foreign files, so that torch reads the tensors in them.

torch's `weights_only` reader stops at the first class or function that it does not allow, unless it
has a substitute of the same name. These substitutes drop their arguments and items. So no package
is imported, and no code of the file runs. A tensor that only the real class can rebuild is missing.
"""

import builtins
import itertools
import pickletools
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

# Modules of Python's library whose objects are data. Objects of the others can do harm, so they
# stay refused.
DATA = {
    "_codecs", "argparse", "array", "collections", "copyreg", "datetime", "decimal", "enum",
    "fractions", "functools", "logging", "numbers", "pathlib", "random", "typing", "uuid",
    "zoneinfo",
}  # fmt: skip
NAMES = {"types.SimpleNamespace", "builtins.getattr"}  # getattr: enum members of some Pythons
PICKLES = 4  # of a file from before torch 1.6: magic number, version, sizes of the machine, content
# Limits of the search in a file. A large file has 100 names and 10**5 opcodes.
MOST_NAMES, MOST_OPCODES = 1000, 2 * 10**6
# Opcodes that keep their first operand.
KEEP = {"REDUCE", "NEWOBJ", "BUILD", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}


class Inert(list):
    """An empty object of a foreign class.

    It is a list because torch appends only to subclasses of list. torch also calls __setstate__.
    """

    def __init__(self, *_: Any):
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Drop an item."""

    def extend(self, _: Any) -> None:
        """Drop items."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # an object can be a dictionary's key
    __eq__ = object.__eq__


class Items:
    """A class whose objects are plain dictionaries, because torch sets the items of no others.

    It stands in for defaultdict and for classes of configurations.
    """

    def __new__(cls, *_: Any) -> Any:
        """Return a dictionary for the items that follow in the file."""
        return OrderedDict()


def stand_ins(path: str) -> list[Any]:
    """Return stand-ins for a torch file's harmless foreign names.

    They are the argument of `torch.serialization.safe_globals`.
    """
    filled: dict[str, bool] = {}
    try:
        for name, opcode in used_names(path):
            filled[name] = filled.get(name, False) or opcode.startswith("SETITEM")
    except Exception:  # damaged, or not torch's format: the reader's own error is clearer
        pass
    pairs = []
    for name, items in itertools.islice(filled.items(), MOST_NAMES):
        current = python_3_name(*name.split(" ", 1))
        if is_harmless(current) and current.isprintable():
            stand_in = Items if items else type(current, (Inert,), {})
            # Both names, because torch translates only some of Python 2's.
            pairs += [(stand_in, current), (stand_in, name.replace(" ", "."))]
    return pairs


def is_harmless(name: str) -> bool:
    """Return whether a name is outside Python's library, or one of its classes of data."""
    module, _, last = name.rpartition(".")
    package = module.split(".")[0]
    if module == "builtins" and isinstance(getattr(builtins, last, None), type):
        return True
    return package not in sys.stdlib_module_names or package in DATA or name in NAMES


def used_names(path: str) -> Iterator[tuple[str, str]]:
    """Yield the names in a torch file's pickle, "module name", each with an opcode.

    The opcode is applied to the name or to its objects.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = next(
                member for member in archive.infolist() if member.filename.endswith("data.pkl")
            )
            # torch does not compress it. A compressed member can have any length.
            if member.compress_type == zipfile.ZIP_STORED:
                with archive.open(member) as file:
                    yield from trace(file)
        return
    with open(path, "rb") as file:
        for _ in range(PICKLES):
            yield from trace(file)


def trace(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (name, opcode) of one pickle, by tracing its stack. No object is built or called."""
    stack: list[Any] = []
    memo: dict[int, str | None] = {}
    argument: Any
    for opcode, argument, _ in itertools.islice(pickletools.genops(file), MOST_OPCODES):
        operands = opcode.stack_before
        if pickletools.markobject in operands:
            while stack.pop() is not pickletools.markobject:
                pass
            operands = operands[: operands.index(pickletools.markobject)]
        popped = [stack.pop() for _ in operands]
        origin = popped[-1] if opcode.name in KEEP else None
        if opcode.name == "GLOBAL":
            origin = argument
        elif opcode.name == "MARK":
            origin = pickletools.markobject
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            origin = memo.get(argument)
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        stack += [origin] * len(opcode.stack_after)
        if isinstance(origin, str):
            yield origin, opcode.name


def python_3_name(module: str, name: str) -> str:
    """Return a global's full name in Python 3.

    torch writes pickles of protocol 2, which have Python 2's names.
    """
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
