"""Options as fields of a dataclass, which declares, documents and checks them.

A dataclass of options has a docstring, their title in --help, and a `group`, their key in YAML.
"""

import difflib
import inspect
import math
import os
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, NamedTuple, get_args

from job.errors import RunError

FEW = 6  # an error lists at most so many choices. Of more it suggests the nearest


def option(
    default: Any,
    text: str,
    *flags: str,
    choices: Collection[str] | None = None,
    others: Callable[[str, str], object] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    multiple_of: int | None = None,
    parse: Callable[[str, str], object] | None = None,
    many: bool = False,
    path: bool = False,
    instead_of: str | None = None,
) -> Any:
    """Declare an option: its default, help text, further flags and valid values.

    others: checks a value that is not one of `choices`.
    path: the value is a path, in which a leading ~ is expanded.
    instead_of: another option, a number. A file or command line that gives only this option
        sets the other one to 0.
    """
    meta: dict[str, Any] = dict(
        text=text, flags=flags, choices=choices, parse=parse, many=many, instead_of=instead_of
    )
    meta |= {"path": path, "others": others}
    meta |= dict(
        at_least=at_least, above=above, below=below, at_most=at_most, multiple_of=multiple_of
    )
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def flag(name: str) -> str:
    """Return the long flag of an option: moco_k -> --moco-k."""
    return "--" + name.replace("_", "-")


def declared(f: Field) -> Any:
    """Return an option's default."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def words_of(name: str, value: Any) -> list[str]:
    """Return a command line's words for an option: --moco-k 5, --no-mlp, --mgd-stages 3 4."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    if isinstance(value, str) and value.startswith("-"):
        return [f"{flag(name)}={value}"]
    return [flag(name), *map(str, value if isinstance(value, list) else [value])]


def differing(
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    unused: Collection[str] = (),
) -> str:
    """Return the options that differ from their defaults, as on a command line.

    An option without a default in `defaults` differs. unused: options to leave out.
    """
    given = {
        name: value
        for name, value in options.items()
        if name not in unused and (name not in defaults or value != defaults[name])
    }
    return shlex.join(word for name, value in given.items() for word in words_of(name, value))


class Group(NamedTuple):
    """The options of a group."""

    title: str
    options: dict[str, Field]  # by name, in the order of their declarations
    keys: dict[str, Field]  # by name, and by name without the group's: moco_k, k


def groups(kind: type) -> dict[str, Group]:
    """Return the groups of a dataclass's options by name.

    An option belongs to the group of the class that first declares it.
    """
    found: dict[str, Group] = {}
    for f in fields(kind):
        owner = next(c for c in reversed(kind.__mro__) if f.name in inspect.get_annotations(c))
        if "group" not in vars(owner):
            raise TypeError(
                f"{owner.__name__} declares options without a `group`, their key in YAML"
            )
        name = vars(owner)["group"]
        title = (owner.__doc__ or "").removesuffix(".")
        found.setdefault(name, Group(title, {}, {})).options[f.name] = f
    for name, group in found.items():
        short = {each.removeprefix(f"{name}_"): f for each, f in group.options.items()}
        group.keys.update(short | group.options)
    return found


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """Return the end of an error that suggests the nearest candidate, if one is near."""
    # The dashes of flags count as equal letters otherwise: --device would be near --mgd-views.
    words = {each.lstrip("-"): each for each in candidates}
    near = difflib.get_close_matches(name.lstrip("-"), words, 1)
    return f"; did you mean {words[near[0]]}?" if near else ""


def expand(path: str, shown: str = "") -> str:
    """Return a path with the home folder instead of a leading ~ or ~user.

    shown: the option, for the error. RunError: the user has no home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise RunError(
            f"{shown} {path}: {user} has no home folder; expected a path. "
            f"For a folder of that name, write ./{path}".lstrip()
        )
    return expanded


def convert(f: Field, value: Any, shown: str) -> Any:
    """Return `value` in the type of the option `f`.

    shown: the flag, or the key of a file, for the error.
    RunError: the value has another type, or is out of range.
    """
    meta, kind = f.metadata, f.type
    if meta["many"]:
        items = value if isinstance(value, (list, tuple)) else [value]
        (kind,) = get_args(kind)
        return [check(convert_one(item, kind, shown), meta, shown, item) for item in items]
    if meta["parse"] and isinstance(value, list):
        value = ",".join(map(str, value))
    return check(convert_one(value, kind, shown), meta, shown, value)


def convert_lists(options: Any) -> None:
    """Convert the lists among a dataclass's options, in place.

    RunError: one is not a list, or an item has another type or is out of range.
    """
    for f in fields(options):
        if f.metadata["many"]:
            value, shown = getattr(options, f.name), flag(f.name)
            if not isinstance(value, (list, tuple)):
                raise RunError(f"{shown} {value!r}: expected a list")
            object.__setattr__(options, f.name, convert(f, value, shown))


def convert_one(value: Any, kind: Any, shown: str) -> Any:
    """Return one value as `kind`. Text can be a number: YAML reads 3e-2 as text.

    RunError: the value has another type. True and false are not numbers.
    """
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    hint = " (YAML reads an empty value and a single ~ as null)" if value is None else ""
    raise RunError(f"{shown} {value!r}: expected {names[kind]}{hint}")


def check(value: Any, meta: Mapping[str, Any], shown: str, written: Any) -> Any:
    """Return `value`, a path expanded, if the option's declaration allows it.

    shown, written: the flag and the user's text, for the error. RunError: it is not allowed.
    """
    if meta["path"]:
        return expand(value, shown)
    if meta["others"] and isinstance(value, str) and value not in meta["choices"]:
        meta["others"](value, shown)
    elif meta["choices"] and value not in meta["choices"]:
        expected = "expected one of " + ", ".join(filter(None, meta["choices"]))
        if len(meta["choices"]) > FEW:
            if near := difflib.get_close_matches(str(value), meta["choices"], 1):
                expected = f"did you mean {near[0]}?"
        raise RunError(f"{shown} {value!r}: {expected}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, above, below, high = meta["at_least"], meta["above"], meta["below"], meta["at_most"]
        bounds = {
            f"at least {low}": low is None or value >= low,
            f"above {above}": above is None or value > above,
        }
        bounds |= {
            f"below {below}": below is None or value < below,
            f"at most {high}": high is None or value <= high,
        }
        bounds |= {"finite": math.isfinite(value)}
        bounds |= {
            f"a multiple of {unit}": value % unit == 0 for unit in [meta["multiple_of"]] if unit
        }
        if broken := [bound for bound, kept in bounds.items() if not kept]:
            raise RunError(f"{shown} {written}: expected {' and '.join(broken)}")
    if meta["parse"]:
        meta["parse"](value, shown)
    return value
