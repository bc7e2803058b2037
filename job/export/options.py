"""The options of a run that differ from the defaults, and a command that has them."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from job.config import Config, read_config, unused_options
from job.declare import convert, flag, words_of
from job.errors import RunError
from job.export.origin import base_name, without_folders

OF_ONE_RUN = {"config", "out", "resume"}  # the run's files, which do not affect the result


def differing(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {option: (value, default)} of the options with an effect that differ.

    Paths have their last component. Options of other versions have the default None.
    """
    default = asdict(Config())
    unused = without_effect(config) | OF_ONE_RUN
    return {
        name: (without_folders(name, value), default.get(name))
        for name, value in config.items()
        if name not in unused and (name not in default or value != default[name])
    }


def checked(config: Mapping[str, Any]) -> Config:
    """Return options as a Config. RunError: some are unknown or out of range."""
    known = {option.name: option for option in fields(Config)}
    if unknown := config.keys() - known.keys():
        raise RunError(f"{', '.join(map(str, unknown))}: unknown options")
    items = config.items()
    return Config(**{name: convert(known[name], value, flag(name)) for name, value in items})


def without_effect(config: Mapping[str, Any]) -> set[str]:
    """Return the options that have no effect with the others."""
    try:
        return unused_options(checked(config))
    except RunError:
        return set()


def command(config: Mapping[str, Any], workers: int) -> str:
    """Return a command of `job.train` with these options, and the last component of each path.

    Return "" for options of another version, which no command has.
    """
    try:
        checked(config)
    except RunError:
        return ""
    arguments = [base_name(config.get("data", ""))]
    for name, (value, _) in differing(config).items():
        if name != "data":
            arguments += words_of(name, value)
    try:
        parsed = asdict(read_config(arguments))
    except RunError:
        return ""
    ignored = without_effect(config) | OF_ONE_RUN
    options = {name: without_folders(name, config[name]) for name in config.keys() - ignored}
    if any(value != parsed.get(name) for name, value in options.items()):
        return ""
    launcher = f"horovodrun -np {workers} " if workers > 1 else ""
    return f"{launcher}python -m job.train {shlex.join(arguments)}"
