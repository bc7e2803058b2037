"""Inert stand-ins for the objects in other people's checkpoints, so that torch reads the tensors beside them.

torch's `weights_only` reader stops at the first class or function that it does not know, except if it is given a
substitute under that name. These substitutes do nothing: they drop all that they are given. So no package is imported,
and nothing of the file runs, whichever name it has. A tensor that only the real class could rebuild is missing then.
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

# Modules of Python's library whose objects are data. All others can do harm elsewhere, so their names stay refused.
DATA = {
    "_codecs", "argparse", "array", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools",
    "logging", "numbers", "pathlib", "random", "typing", "uuid", "zoneinfo",
}  # fmt: skip
NAMES = {"types.SimpleNamespace", "builtins.getattr"}  # getattr: enum members of some Pythons
PICKLES = 4  # before torch 1.6 a file began with a magic number, a version, a machine's sizes, and the content
# Limits of the search in a file. A large file has 100 names and 10**5 opcodes.
MOST_NAMES, MOST_OPCODES = 1000, 2 * 10**6
# Opcodes that keep their first operand.
KEEP = {"REDUCE", "NEWOBJ", "BUILD", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}


class Inert(list):
    """An object of a foreign class, empty. torch appends only to subclasses of list, and calls __setstate__."""

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
    """A class whose objects are dictionaries (defaultdict, a configuration): it makes plain ones. torch fills no others."""

    def __new__(cls, *_: Any) -> Any:
        """Return a dictionary for the items that follow in the file."""
        return OrderedDict()


def stand_ins(path: str) -> list[Any]:
    """Return stand-ins for a torch file's harmless foreign names, as `torch.serialization.safe_globals` takes them."""
    filled: dict[str, bool] = {}
    try:
        for name, opcode in used_names(path):
            filled[name] = filled.get(name, False) or opcode.startswith("SETITEM")
    except Exception:  # damage, or not torch's format: the reader itself says what is wrong
        pass
    found = []
    for name, items in itertools.islice(filled.items(), MOST_NAMES):
        current = python_3_name(*name.split(" ", 1))
        if is_harmless(current) and current.isprintable():
            kind = Items if items else type(current, (Inert,), {})
            # torch maps only some of Python 2's names.
            found += [(kind, current), (kind, name.replace(" ", "."))]
    return found


def is_harmless(name: str) -> bool:
    """Whether the name is no part of Python's own library, or one of its kinds of data."""
    module, _, last = name.rpartition(".")
    package = module.split(".")[0]
    if module == "builtins" and isinstance(getattr(builtins, last, None), type):
        return True
    return package not in sys.stdlib_module_names or package in DATA or name in NAMES


def used_names(path: str) -> Iterator[tuple[str, str]]:
    """Yield the names in a torch file's pickle, "module name", with each opcode applied to one or to its objects."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = next(
                member for member in archive.infolist() if member.filename.endswith("data.pkl")
            )
            if (
                member.compress_type == zipfile.ZIP_STORED
            ):  # as torch writes it; a compressed one may be of any length
                with archive.open(member) as file:
                    yield from trace(file)
        return
    with open(path, "rb") as file:
        for _ in range(PICKLES):
            yield from trace(file)


def trace(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (name, opcode) for one pickle, by following only where its values go; nothing of it is built or called."""
    stack: list[Any] = []
    memo: dict[int, str | None] = {}
    argument: Any
    for opcode, argument, _ in itertools.islice(pickletools.genops(file), MOST_OPCODES):
        operands = opcode.stack_before
        if pickletools.markobject in operands:
            while stack.pop() is not pickletools.markobject:
                pass
            operands = operands[: operands.index(pickletools.markobject)]
        taken = [stack.pop() for _ in operands]
        origin = taken[-1] if opcode.name in KEEP else None
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
    """Return a global's full name; pickles of protocol 2, which torch writes, have Python 2's names."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
