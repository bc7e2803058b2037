"""Every option of a training run: declared, documented and checked in one place.

Options come from the presets or YAML files of `--config` and from the command line, which wins.
"""

import argparse
import difflib
import math
import os
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources

import yaml

from job.errors import RunError
from job.schedule import parse_refresh, parse_save_every
from mgd.reducers import REDUCERS
from moco.encoder import ARCHS, DEPTH, STEMS

# Flags of the original that Horovod, or this program's own way, replaces.
RETIRED = {
    "--dist-url": "Horovod's workers find each other; start them with `horovodrun -np N python -m job.train ...`",
    "--dist-backend": "Horovod chooses NCCL or Gloo itself; leave it out",
    "--world-size": "the number of workers is horovodrun's: `horovodrun -np N python -m job.train ...`",
    "--rank": "the launcher numbers the workers: `horovodrun -np N python -m job.train ...`",
    "--multiprocessing-distributed": "one process a GPU is horovodrun's work: `horovodrun -np N python -m job.train ...`",
    "--gpu": "each worker takes the GPU of its local rank; choose some with CUDA_VISIBLE_DEVICES",
    "--start-epoch": "a checkpoint knows its epoch and step; use `--resume auto`",
}


def option(default, text, *flags, choices=None, at_least=None, above=None, below=None, at_most=None, parse=None, many=False):
    """Declare an option: its default, help text, further flags, and what its value must be."""
    meta = dict(text=text, flags=flags, choices=choices, parse=parse, many=many)
    meta |= dict(at_least=at_least, above=above, below=below, at_most=at_most)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class Config:
    """The options of `job.train`, under MoCo's own names where MoCo has them."""

    data: str = option("", "folder with train/<class>/*; or the word digits: scikit-learn's digits, written to data/digits")
    config: list[str] = option([], "a YAML file, or a preset's name; may be given again", many=True)
    out: str = option("", "folder of this run (default: runs/ARCH)")

    arch: str = option("resnet18", "the student's network", "-a", choices=ARCHS)
    stem: str = option("imagenet", "small: a first layer for images of about 32 pixels, of student and teacher", choices=STEMS)
    image_size: int = option(224, "side of the views in pixels", at_least=8)
    aug_plus: bool = option(False, "MoCo v2's augmentations")
    crop_min: float = option(0.2, "smallest share of an image's area that a view shows", above=0.0, at_most=1.0)

    epochs: int = option(200, "epochs to train", at_least=1)
    batch_size: int = option(256, "images in a step, over all workers together", "-b", at_least=1)
    lr: float = option(0.03, "learning rate", "--learning-rate", at_least=0.0)
    schedule: list[int] = option([120, 160], "epochs at which the learning rate falls tenfold", at_least=0, many=True)
    cos: bool = option(False, "cosine learning rate in place of --schedule")
    warmup_epochs: int = option(3, "epochs over which the learning rate rises", at_least=0)
    momentum: float = option(0.9, "momentum of SGD", at_least=0.0, below=1.0)
    weight_decay: float = option(1e-4, "weight decay", "--wd", at_least=0.0)
    precision: str = option("float32", "bf16: autocast, where the hardware has it (see README)", choices=("float32", "bf16"))
    seed: int = option(0, "all random numbers follow from it", at_least=0, below=2**63)
    workers: int = option(-1, "data loading processes of each worker (-1: as many as it has cores; 0: none)", "-j", at_least=-1)

    moco_dim: int = option(128, "width of the contrastive features", at_least=1)
    moco_k: int = option(65536, "negative keys in the queue", at_least=1)
    moco_m: float = option(0.999, "momentum of the key encoder", at_least=0.0, below=1.0)
    moco_t: float = option(0.07, "softmax temperature", above=0.0)
    mlp: bool = option(False, "MoCo v2's head of two layers")

    teacher: str = option("", "checkpoint of the teacher; without one this is plain MoCo")
    teacher_arch: str = option("", "the teacher's network (default: as its file says)", choices=("", *ARCHS))
    reducer: str = option("amp", "how the teacher channels of a match become one", choices=tuple(REDUCERS))
    loss_factor: float = option(1e4, "the distillation loss is divided by it", above=0.0)
    margins: str = option("loaded", "init: margins of an unloaded teacher, as the original had", choices=("loaded", "init"))
    mgd_stages: list[int] = option([1, 2, 3, 4], "stages to distil", at_least=1, below=DEPTH + 1, many=True)
    mgd_images: int = option(20_000, "images that a refresh measures", at_least=1)
    refresh_epochs: str = option("log", "when the matching is solved: log, never, every:N, or 0,5,10", parse=parse_refresh)

    resume: str = option("", "auto: go on from the newest checkpoint in --out, if any; or a checkpoint's path")
    save_every: str = option("1", "epochs between checkpoints; or steps, as in 500steps", parse=parse_save_every)
    keep: int = option(3, "checkpoints kept", at_least=1)
    print_freq: int = option(10, "steps between lines where there is no terminal", "-p", at_least=1)
    max_bad_images: int = option(100, "undecodable images after which the run fails", at_least=0)

    def folder(self) -> str:
        """The run's folder."""
        return self.out or os.path.join("runs", self.arch)


FIELDS = {f.name: f for f in fields(Config)}


def flag(name: str) -> str:
    """The long flag of an option: moco_k -> --moco-k."""
    return "--" + name.replace("_", "-")


def convert(name: str, value, shown: str):
    """Return `value` as option `name` wants it; `shown` is what the user wrote it behind (a flag, or a file's key)."""
    f = FIELDS[name]
    meta, kind = f.metadata, f.type
    if meta["many"]:
        items = value if isinstance(value, list) else [value]
        kind = int if kind == list[int] else str
        return [check(convert_one(item, kind, shown), meta, shown) for item in items]
    if meta["parse"] and isinstance(value, list):
        value = ",".join(map(str, value))
    return check(convert_one(value, kind, shown), meta, shown)


def convert_one(value, kind: type, shown: str):
    """Return one value as `kind`: numbers also from text (YAML reads 3e-2 as text), but nothing from true and false."""
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
    raise RunError(f"{shown} {value!r}: expected {names[kind]}")


def check(value, meta, shown: str):
    """Return `value` if it is within what the option's declaration says."""
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], 1)
        expected = f"did you mean {near[0]}?" if near else "expected one of " + ", ".join(filter(None, meta["choices"]))
        raise RunError(f"{shown} {value!r}: {expected}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, above, below, high = meta["at_least"], meta["above"], meta["below"], meta["at_most"]
        bounds = {f"at least {low}": low is None or value >= low, f"above {above}": above is None or value > above}
        bounds |= {f"below {below}": below is None or value < below, f"at most {high}": high is None or value <= high}
        bounds |= {"finite": math.isfinite(value)}
        if broken := [bound for bound, kept in bounds.items() if not kept]:
            raise RunError(f"{shown} {value}: expected {' and '.join(broken)}")
    if meta["parse"]:
        meta["parse"](value, shown)
    return value


def read_yaml(path: str) -> dict:
    """Return the options of a YAML file, or of the preset of that name, checked."""
    preset = resources.files("job") / "presets" / f"{path}.yaml"
    try:
        text = preset.read_text() if preset.is_file() and not os.path.exists(path) else open(path, encoding="utf-8").read()
        content = yaml.safe_load(text)
    except OSError as error:
        known = ", ".join(sorted(p.name.removesuffix(".yaml") for p in (resources.files("job") / "presets").iterdir()))
        raise RunError(f"--config {path}: {error.strerror or error}; expected a YAML file, or a preset ({known})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, a day that does not exist, too many digits
        raise RunError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RunError(f"--config {path}: expected a mapping such as `lr: 0.03`, not {type(content).__name__}")
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS or name == "config":
            near = difflib.get_close_matches(name, FIELDS.keys() - {"config"}, 1)
            raise RunError(f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        options[name] = convert(name, value, f"{path}: {key}")
    return options


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are this program's one line."""

    def error(self, message: str):
        raise RunError(f"{message} (all options: --help)")


def build_parser() -> Parser:
    """Return a parser of all options, which gives only what the command line names."""
    parser = Parser(prog="job.train", description=Config.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="the data folder, or the word digits; the same as --data")
    for name, f in FIELDS.items():
        meta = f.metadata
        default = f.default if f.default is not MISSING else " ".join(map(str, f.default_factory()))
        text = meta["text"] + (f" [{' '.join(filter(None, meta['choices']))}]" if meta["choices"] else "")
        text += "" if "default:" in text or default is False or default == "" else f" (default: {default})"
        names = [*meta["flags"], flag(name)]
        if f.type is bool:
            parser.add_argument(*names, dest=name, action=argparse.BooleanOptionalAction, help=text.replace("%", "%%"))
        elif name == "config":  # a list of values would take in DIR
            parser.add_argument(*names, action="append", metavar="X", help=text)
        else:
            parser.add_argument(*names, dest=name, nargs="+" if meta["many"] else None, metavar="X", help=text.replace("%", "%%"))
    return parser


def read_config(argv: list[str]) -> Config:
    """Return the options of a command line and its --config files. RunError: anything unknown or out of range."""
    for argument in argv:
        if (name := argument.split("=")[0]) in RETIRED:
            raise RunError(f"{name} is not needed here: {RETIRED[name]}")
    given = vars(build_parser().parse_args(argv))
    if "folder" in given:
        folder = given.pop("folder")
        if given.setdefault("data", folder) != folder:
            raise RunError(f"two data folders: {folder} and --data {given['data']}; give one")
    options = {}
    for path in given.get("config", []):
        options.update(read_yaml(path))
    options.update({name: convert(name, value, flag(name)) for name, value in given.items()})
    config = Config(**options)
    if not config.data:
        raise RunError("no data: give a folder with train/<class>/* images, or the word digits (all options: --help)")
    config.mgd_stages = sorted(set(config.mgd_stages))
    return config
