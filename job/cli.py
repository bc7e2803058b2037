"""Options as fields of a dataclass: declared, documented and checked where they stand, read from YAML and the command line.

Options come from the presets or YAML files of `--config` and from the command line, which wins.
A dataclass that declares options has a docstring, their title in --help, and a `group`, their key in YAML.
"""

import argparse
import difflib
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields
from importlib import resources
from typing import Any, NamedTuple, NoReturn, get_args

import yaml

from job.errors import RunError

FEW = 6  # choices that an error lists; of more it tells the nearest
LONGEST_FILE = 2**16  # characters
ONE_VALUE = "expected one value, or a list of values, as in `lr: 0.03`"
IN_GROUPS = (
    "A YAML file (--config) gives an option by its name, `image_size: 64`, or in the group in "
    "brackets below, `data: {image_size: 64}`."
)


def option(
    default: Any,
    text: str,
    *flags: str,
    choices: Collection[str] | None = None,
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
    """Declare an option: its default, help text, further flags and what its value must be.

    path: the value is a path, in which a leading ~ is expanded. instead_of: the number that the option sets
    to 0 if a file, or the command line, gives it and not the other.
    """
    meta: dict[str, Any] = dict(text=text, flags=flags, choices=choices, parse=parse, many=many, instead_of=instead_of)
    meta["path"] = path
    meta |= dict(at_least=at_least, above=above, below=below, at_most=at_most, multiple_of=multiple_of)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def flag(name: str) -> str:
    """The long flag of an option: moco_k -> --moco-k."""
    return "--" + name.replace("_", "-")


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
        name = vars(owner)["group"]
        title = (owner.__doc__ or "").removesuffix(".")
        found.setdefault(name, Group(title, {}, {})).options[f.name] = f
    for name, group in found.items():
        short = {each.removeprefix(f"{name}_"): f for each, f in group.options.items()}
        group.keys.update(short | group.options)
    return found


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """Return the end of an error that suggests the nearest candidate, if one is near."""
    near = difflib.get_close_matches(name, candidates, 1)
    return f"; did you mean {near[0]}?" if near else ""


def expand(path: str, shown: str = "") -> str:
    """Return a path with the home folder in place of a leading ~ or ~user.

    shown: the option, for the error. RunError: there is no such home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise RunError(
            f"{shown} {path}: {user} has no home folder; expected a path. Write ./{path} for a folder of that name".lstrip()
        )
    return expanded


def convert(f: Field, value: Any, shown: str) -> Any:
    """Return `value` as option `f` wants it; `shown` is what the user wrote it behind (a flag, or a file's key).

    RunError: it is of another type, or not within the option's declaration.
    """
    meta, kind = f.metadata, f.type
    if meta["many"]:
        items = value if isinstance(value, list) else [value]
        (kind,) = get_args(kind)
        return [check(convert_one(item, kind, shown), meta, shown, item) for item in items]
    if meta["parse"] and isinstance(value, list):
        value = ",".join(map(str, value))
    return check(convert_one(value, kind, shown), meta, shown, value)


def convert_one(value: Any, kind: Any, shown: str) -> Any:
    """Return one value as `kind`: numbers also from text (YAML reads 3e-2 as text), but nothing from true and false.

    RunError: it is of another type.
    """
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    hint = " (YAML reads an empty value and a bare ~ as nothing)" if value is None else ""
    raise RunError(f"{shown} {value!r}: expected {names[kind]}{hint}")


def check(value: Any, meta: Mapping[str, Any], shown: str, written: Any) -> Any:
    """Return `value`, a path expanded, for which the user wrote `written`, if the option's declaration allows it.

    RunError: it does not.
    """
    if meta["path"]:
        return expand(value, shown)
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], 1) if len(meta["choices"]) > FEW else []
        expected = f"did you mean {near[0]}?" if near else "expected one of " + ", ".join(filter(None, meta["choices"]))
        raise RunError(f"{shown} {value!r}: {expected}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, above, below, high = meta["at_least"], meta["above"], meta["below"], meta["at_most"]
        bounds = {f"at least {low}": low is None or value >= low, f"above {above}": above is None or value > above}
        bounds |= {f"below {below}": below is None or value < below, f"at most {high}": high is None or value <= high}
        bounds |= {"finite": math.isfinite(value)}
        bounds |= {f"a multiple of {unit}": value % unit == 0 for unit in [meta["multiple_of"]] if unit}
        if broken := [bound for bound, kept in bounds.items() if not kept]:
            raise RunError(f"{shown} {written}: expected {' and '.join(broken)}")
    if meta["parse"]:
        meta["parse"](value, shown)
    return value


def read_yaml(path: str, kind: type) -> dict[str, Any]:
    """Return the options of a YAML file, or of the preset of that name, checked by `kind`.

    RunError: the file is not YAML, or an option is unknown, given twice or out of range.
    """
    options: dict[str, Any] = {}
    written: dict[str, str] = {}  # the key of each option
    try:
        loader = yaml.SafeLoader(read_text(path))
        for key, f, value in entries(loader.get_single_node(), path, kind):
            if f.name in options:
                both = f"{written[f.name]} and {key}"
                fix = "leave out one of them"
                raise RunError(f"--config {path}: {both} give the same option twice; {fix}")
            content = loader.construct_object(value, deep=True)
            options[f.name] = convert(f, content, f"{path}: {key}")
            written[f.name] = key
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that does not exist, too many digits
        raise RunError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    except (LookupError, AttributeError):  # of PyYAML's constructors
        raise RunError(f"--config {path}: a value is not what its tag says, as in !!bool 5: leave out the tag") from None
    except RecursionError:
        raise RunError(f"--config {path}: brackets within brackets: expected options such as `lr: 0.03`") from None
    return options


def read_text(path: str) -> str:
    """Return what a YAML file holds, or the preset of that name. RunError: there is no such file, or it is no text."""
    presets = {p.name.removesuffix(".yaml"): p for p in (resources.files("job") / "presets").iterdir()}
    if path in presets and not os.path.exists(path):
        return presets[path].read_text()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_FILE + 1)
    except OSError as error:
        names = ", ".join(sorted(presets))
        raise RunError(f"--config {path}: {error.strerror or error}; expected a YAML file, or a preset ({names})") from None
    except ValueError as error:
        raise RunError(f"--config {path}: not YAML: {error}") from None
    if len(text) > LONGEST_FILE:
        raise RunError(f"--config {path}: more than {LONGEST_FILE} characters: expected options such as `lr: 0.03`")
    return text


def entries(
    node: yaml.Node | None,
    path: str,
    kind: type,
) -> Iterator[tuple[str, Field, yaml.Node]]:
    """Yield the key of each option in a file's YAML, dotted if it is in a group, with its value.

    A key with a mapping is a group's, any other an option's: `data` is both.
    RunError: there is no such option or group.
    """
    known = groups(kind)
    options = {f.name: f for f in fields(kind)}
    for table in (options, *(group.keys for group in known.values())):
        table.pop("config", None)  # a file cannot name files
    for key, value in pairs(node, path):
        name = key.replace("-", "_")
        if not isinstance(value, yaml.MappingNode):
            if name in known and name not in options:
                example = f"`{key}: {{{next(iter(known[name].keys))}: ...}}`"
                raise RunError(f"{path}: {key}: expected a mapping, as in {example}")
            if name not in options:
                hint = did_you_mean(name, options)
                raise RunError(f"--config {path}: unknown key {key!r}{hint}")
            yield key, options[name], value
            continue
        if name in options and name not in known:
            raise RunError(f"{path}: {key}: {ONE_VALUE}")
        if name not in known:
            hint = did_you_mean(name, known) or f"; expected one of {', '.join(known)}"
            raise RunError(f"--config {path}: unknown group {key!r}{hint}")
        for inner, part in pairs(value, path, f"{key}."):
            yield inner, look_up(inner, name, known, path), part


def look_up(key: str, name: str, known: Mapping[str, Group], path: str) -> Field:
    """Return the option of a dotted key in the group `name`. RunError: there is none."""
    own, word = known[name].keys, key.partition(".")[2].replace("-", "_")
    if word in own:
        return own[word]
    elsewhere = [f"{name}.{word}" for name, group in known.items() if word in group.keys]
    near = elsewhere or [f"{name}.{each}" for each in difflib.get_close_matches(word, own, 1)]
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RunError(f"--config {path}: unknown key {key!r}{hint}")


def pairs(node: yaml.Node | None, path: str, group: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yield the keys, `group` before them, and values of a file's YAML, or of a group in it.

    A value is one value, a list of values, or outside a group a mapping. What has no list in a list
    and no group in a group stays small, whatever its anchors and aliases multiply.
    RunError: anything else, or a key given twice.
    """
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return
    if not isinstance(node, yaml.MappingNode):
        raise RunError(f"--config {path}: expected a mapping such as `lr: 0.03`, not a {node.id}")  # type: ignore[attr-defined]
    seen: dict[str, bool] = {}
    for key, value in node.value:
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        is_group = isinstance(value, yaml.MappingNode) and not group
        shown = group + (key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}")
        one_each = is_group or all(isinstance(part, yaml.ScalarNode) for part in parts)
        if not isinstance(key, yaml.ScalarNode) or not one_each:
            raise RunError(f"{path}: {shown}: {ONE_VALUE}")
        if shown in seen:
            fix = "put both into one group" if is_group or seen[shown] else "leave out one of them"
            raise RunError(f"--config {path}: {shown} is given twice; {fix}")
        seen[shown] = is_group
        yield shown, value


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are this program's one line.

    dotted: flags by an option's keys in YAML, for errors: {"moco.k": "--moco-k"}.
    """

    dotted: dict[str, str] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments. RunError: some are unknown."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = next((each for each in unknown if each.startswith("-")), "").split("=")[0]
            meant = self.dotted.get(word.removeprefix("--").replace("-", "_"), word)
            hint = did_you_mean(meant, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """RunError: what argparse says."""
        raise RunError(f"{message} (all options: --help)")


def build_parser(prog: str, kind: type) -> Parser:
    """Return a parser of a dataclass's options, which gives only what the command line names."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} DIR [options]",
        description=f"{kind.__doc__} {IN_GROUPS}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    known = groups(kind)
    parser.dotted = {}
    for name, group in known.items():
        parser.dotted |= {f"{name}.{key}": flag(f.name) for key, f in group.keys.items()}
        section = parser.add_argument_group(f"{group.title} ({name})")
        for f in group.options.values():
            if f.name == "data":
                section.add_argument("folder", nargs="?", metavar="DIR", help="the same as --data DIR")
            add_flag(section, f)
    return parser


def add_flag(section: Any, f: Field) -> None:
    """Add an option's flags to a section of --help."""
    name, meta = f.name, f.metadata
    default = f.default if f.default_factory is MISSING else " ".join(map(str, f.default_factory()))
    text = meta["text"] + (f" [{' '.join(filter(None, meta['choices']))}]" if meta["choices"] else "")
    text += "" if "default:" in text or default is False or default == "" else f" (default: {default})"
    text, names = text.replace("%", "%%"), [*meta["flags"], flag(name)]
    if f.type is bool:
        section.add_argument(*names, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif name == "config":  # a list of values would take in DIR
        section.add_argument(*names, action="append", metavar="X", help=text)
    else:
        many = "+" if meta["many"] else None
        section.add_argument(*names, dest=name, nargs=many, metavar="X", help=text)


def overlay(options: dict[str, Any], given: dict[str, Any], known: dict[str, Field]) -> None:
    """Let what a file or the command line has given take the place of what came before it."""
    options.update({other: 0.0 for name in given if (other := known[name].metadata["instead_of"])})
    options.update(given)


def read(prog: str, kind: type, argv: list[str]) -> tuple[Any, set[str]]:
    """Return a `kind` from a command line and its --config files, and the names on the command line.

    RunError: anything unknown or out of range, or no data.
    """
    known = {f.name: f for f in fields(kind)}
    given = vars(build_parser(prog, kind).parse_args(argv))
    folder = given.pop("folder", None)
    given = {name: convert(known[name], value, flag(name)) for name, value in given.items()}
    if folder is not None:
        folder = convert(known["data"], folder, "DIR")
        if given.setdefault("data", folder) != folder:
            raise RunError(f"two data folders: {folder} and --data {given['data']}; give one")
    options: dict[str, Any] = {}
    for path in given.get("config", []):
        overlay(options, read_yaml(path, kind), known)
    overlay(options, given, known)
    if not options.get("data"):
        raise RunError("no data: give a folder with train/<class>/* images, or the word digits (all options: --help)")
    return kind(**options), set(given)
