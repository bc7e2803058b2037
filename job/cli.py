"""Read options from presets, YAML files and the command line, which overrides them."""

import argparse
from dataclasses import Field, fields
from typing import Any, NoReturn, TypeVar

from job import __version__
from job.declare import convert, declared, did_you_mean, flag, groups
from job.errors import RunError
from job.yaml_files import read_yaml

IN_GROUPS = (
    "--config reads options from a YAML file by name, `image_size: 64`, or in the groups below, "
    "`data: {image_size: 64}`."
)

DEVICE = ("--device", "--gpu", "--gpus", "--cuda", "--cpu")
ON_DEVICES = (
    "Programs use the GPUs of the machine. To use the CPU, or only some GPUs, set "
    "CUDA_VISIBLE_DEVICES, such as CUDA_VISIBLE_DEVICES= or CUDA_VISIBLE_DEVICES=0,1"
)
NO_DATA = "DIR: missing; expected a folder of images, a text file with a path a line, or digits"
Given = TypeVar("Given")
MORE = "more_data"  # the option of programs that take several folders


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are this program's one line.

    dotted: flags by an option's keys in YAML, for errors: {"moco.k": "--moco-k"}.
    """

    dotted: dict[str, str] = {}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--version", action="version", version=f"moco-mgd {__version__}")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments. RunError: some are unknown."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = next((each for each in unknown if each.startswith("-")), "").split("=")[0]
            meant = self.dotted.get(word.removeprefix("--").replace("-", "_"), word)
            if word in DEVICE:
                self.error(f"{word}: no such option. {ON_DEVICES}")
            hint = did_you_mean(meant, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """RunError: the message of argparse."""
        raise RunError(f"{message} (all options: --help)")


def build_parser(prog: str, kind: type) -> Parser:
    """Return a parser of a dataclass's options, without those missing on the command line."""
    several = MORE in {f.name for f in fields(kind)}
    parser = Parser(
        prog=prog,
        usage=f"{prog} DIR {'[DIR ...] ' if several else ''}[options]",
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
                further = " --more-data DIR ..." if several else ""
                text = f"the same as --data DIR{further}"
                section.add_argument("folders", nargs="*", metavar="DIR", help=text)
            add_flag(section, f)
    return parser


def add_flag(section: Any, f: Field) -> None:
    """Add an option's flags to a section of --help."""
    name, meta, value = f.name, f.metadata, declared(f)
    default = " ".join(map(str, value)) if isinstance(value, list) else value
    text = meta["text"]
    if meta["choices"]:
        text += f" [{' '.join(filter(None, meta['choices']))}]"
    if "default:" not in text and default is not False and default != "":
        text += f" (default: {default})"
    text, names = text.replace("%", "%%"), [*meta["flags"], flag(name)]
    if f.type is bool:
        section.add_argument(*names, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif name == "config":  # a list of values would include DIR
        section.add_argument(*names, action="append", metavar="X", help=text)
    else:
        nargs = ("*" if value else "+") if meta["many"] else None
        section.add_argument(*names, dest=name, nargs=nargs, metavar="X", help=text)


def overlay(options: dict[str, Any], given: dict[str, Any], known: dict[str, Field]) -> None:
    """Override `options` by those that a file or the command line gives.

    Further folders belong to the first one: another first folder drops them.
    """
    if "data" in given and "data" in options:
        options.pop(MORE, None)
    options.update({other: 0.0 for name in given if (other := known[name].metadata["instead_of"])})
    options.update(given)


def read(prog: str, kind: type, argv: list[str]) -> tuple[Any, set[str]]:
    """Return a `kind` from a command line and its files, and the options on the command line.

    RunError: an option is unknown or out of range, or the data are missing.
    """
    known = {f.name: f for f in fields(kind)}
    given = vars(build_parser(prog, kind).parse_args(argv))
    folders = given.pop("folders", [])
    given = {name: convert(known[name], value, flag(name)) for name, value in given.items()}
    if folders:
        folder, *more = (convert(known["data"], folder, "DIR") for folder in folders)
        if given.setdefault("data", folder) != folder:
            raise RunError(f"DIR {folder} and --data {given['data']}: expected one of them")
        if more and MORE not in known:
            fix = "List the images of all in one text file"
            raise RunError(f"DIR {folder} {' '.join(more)}: several; expected one. {fix}")
        if more and given.setdefault(MORE, more) != more:
            raise RunError(f"DIR {more[0]} and --more-data: expected one of them")
    options: dict[str, Any] = {}
    for path in given.get("config", []):
        overlay(options, read_yaml(path, kind), known)
    overlay(options, given, known)
    if not options.get("data"):
        raise RunError(f"{NO_DATA} (all options: --help)")
    return kind(**options), set(given)


def checked(options: Given) -> Given:
    """Return options from Python code, checked as those of a command line.

    RunError: an option has another type or is out of range, or the data are missing.
    """
    known: tuple[Field, ...] = fields(options)  # type: ignore[arg-type]
    values = {f.name: convert(f, getattr(options, f.name), flag(f.name)) for f in known}
    if not values["data"]:
        raise RunError(NO_DATA)
    return type(options)(**values)
