"""Read options from YAML files and presets: by their names, or in their groups."""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from importlib import resources
from typing import Any

import yaml

from job.declare import Group, convert, did_you_mean, groups
from job.errors import RunError

LONGEST_FILE = 2**16  # characters
NOTHING, MAPPING = "tag:yaml.org,2002:null", "tag:yaml.org,2002:map"
ONE_VALUE = "expected one value, or a list of values, as in `lr: 0.03`"


def read_yaml(path: str, kind: type) -> dict[str, Any]:
    """Return the options of a YAML file, or of the preset of that name, checked by `kind`.

    RunError: the file is not YAML, or an option is unknown, given twice or out of range.
    """
    options: dict[str, Any] = {}
    written: dict[str, str] = {}  # option: its key in the file
    try:
        loader = yaml.SafeLoader(read_text(path))
        for key, f, value in entries(loader.get_single_node(), path, kind):
            if f.name in options:
                both = f"{written[f.name]} and {key}"
                fix = "leave out one of them"
                raise RunError(f"--config {path}: {both} are the same option; {fix}")
            content = loader.construct_object(value, deep=True)
            options[f.name] = convert(f, content, f"{path}: {key}")
            written[f.name] = key
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, too many digits
        raise RunError(f"--config {path}: not YAML: {not_yaml(error)}") from None
    except (LookupError, AttributeError):  # of PyYAML's constructors
        raise RunError(
            f"--config {path}: a value does not fit its tag, as in !!bool 5. Leave out the tag"
        ) from None
    except RecursionError:
        raise RunError(
            f"--config {path}: too many nested brackets; expected options such as `lr: 0.03`"
        ) from None
    return options


def not_yaml(error: Exception) -> str:
    """Return the line, column and problem of an error of PyYAML, or the text of another error."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        text = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(text.split())


def read_text(path: str) -> str:
    """Return the text of a YAML file, or of the preset of that name. RunError: not readable."""
    files = (resources.files("job") / "presets").iterdir()
    presets = {
        file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")
    }
    if path in presets and not os.path.exists(path):
        return presets[path].read_text()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_FILE + 1)
    except OSError as error:
        names = ", ".join(sorted(presets))
        raise RunError(
            f"--config {path}: {error.strerror or error}; expected a YAML file, or a preset "
            f"({names})"
        ) from None
    except ValueError as error:
        raise RunError(f"--config {path}: not YAML: {error}") from None
    if len(text) > LONGEST_FILE:
        raise RunError(
            f"--config {path}: more than {LONGEST_FILE} characters; "
            "expected options such as `lr: 0.03`"
        )
    return text


def entries(
    node: yaml.Node | None,
    path: str,
    kind: type,
) -> Iterator[tuple[str, Field, yaml.Node]]:
    """Yield the key of each option in a file's YAML, dotted if it is in a group, with its value.

    A key with a mapping is a group's, any other an option's: `data` is both.
    RunError: an unknown option or group.
    """
    known = groups(kind)
    options = {f.name: f for f in fields(kind)}
    for table in (options, *(group.keys for group in known.values())):
        table.pop("config", None)  # a file cannot name files
    for key, value in pairs(node, path):
        name = key.replace("-", "_")
        if not isinstance(value, yaml.MappingNode):
            if name in known and name not in options:
                empty = "; the group is empty" if value.tag == NOTHING else ""
                example = f"`{key}: {{{next(iter(known[name].keys))}: ...}}`"
                raise RunError(f"{path}: {key}: expected a mapping, as in {example}{empty}")
            if name not in options:
                hint = did_you_mean(name, options)
                raise RunError(f"--config {path}: unknown key {key!r}{hint}")
            yield key, options[name], value
            continue
        if name in options and name not in known:
            raise RunError(f"{path}: {key}: {ONE_VALUE}")
        if name not in known:
            hint = did_you_mean(name.lower(), known) or f"; expected one of {', '.join(known)}"
            raise RunError(f"--config {path}: unknown group {key!r}{hint}")
        for inner, inner_value in pairs(value, path, f"{key}."):
            yield inner, look_up(inner, name, known, path), inner_value


def look_up(key: str, name: str, known: Mapping[str, Group], path: str) -> Field:
    """Return the option of a dotted key in the group `name`. RunError: an unknown option."""
    own, short = known[name].keys, key.partition(".")[2].replace("-", "_")
    if short in own:
        return own[short]
    near = [f"{name}.{short}" for name, group in known.items() if short in group.keys]
    near = near or [f"{name}.{each}" for each in difflib.get_close_matches(short.lower(), own, 1)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise RunError(f"--config {path}: unknown key {key!r}{hint}")


def pairs(node: yaml.Node | None, path: str, group: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yield the keys, `group` before them, and values of a file's YAML, or of a group in it.

    A value is one value, a list of values, or outside a group a mapping. Without lists in lists and
    groups in groups, anchors and aliases cannot multiply a small file into a huge one.
    RunError: another value, or a key given twice.
    """
    if node is None or node.tag == NOTHING:
        return
    if isinstance(node, yaml.MappingNode) and node.tag != MAPPING:
        raise RunError(
            f"--config {path}: {group}{node.tag}: expected a mapping without a tag. Leave it out"
        )
    if not isinstance(node, yaml.MappingNode):
        kind = node.id  # type: ignore[attr-defined]
        raise RunError(f"--config {path}: a {kind}; expected a mapping such as `lr: 0.03`")
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
