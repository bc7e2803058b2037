"""Fuzz targets: options in YAML files and on command lines."""

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from random import Random

import yaml
from mutations import change

from job.config import Config, read_config

TOKENS = [b"\n", b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"<<: ", b"'", b'"', b"|\n "]
TOKENS += [b"? ", b"\t", b"--- ", b"~", b"!!python/object:os.system ", b"!!bool ", b"!!int "]
TOKENS += [b"!!timestamp ", b"!!binary ", b"!!set ", b"!!float "]
TOKENS += b"2020-13-45 0x 0b 1_0 1:30 .inf .nan 1e999 -1 null".split()
TOKENS += [b"9" * 20, b"9" * 5000, b"%YAML 9.9\n", b"\xff", b"\xe2\x80\xa8", b"\x00"]
TOKENS += [b"\xed\xa0\x80", b"[" * 2000, b"{a: " * 300, b"moco: {k: ", b"mgd: *a", b"data:\n "]
FLAGS = [
    b"--" + f.name.replace("_", "-").encode()
    for f in dataclasses.fields(Config)
    if f.name != "config"
]
VALUES = b"0 -1 1e-3 nan inf 1_0 \xd9\xa3 0,5 every:2 500steps \xff log resnet50 small".split()
VALUES += [b"9" * 5000, b""]


class Yaml:
    """Inputs that are a YAML file."""

    @staticmethod
    def seeds() -> list[bytes]:
        presets = [path.read_bytes() for path in sorted(Path("job/presets").glob("*.yaml"))]
        options = yaml.safe_dump(dataclasses.asdict(Config(data="x"))).replace("config: []\n", "")
        grouped = b"moco: &a {k: 9, mlp: true}\nmgd:\n  stages: [1, 2]\n  refresh_epochs: [0, 5]\n"
        grouped += b"data: {data: x}\nlr: 1\n"
        flat = b"lr: 0.1\nschedule: [1, 2]\nrefresh_epochs: [0, 5]\nout: &a 'x'\nteacher: *a\n"
        return [*presets, options.encode(), grouped, flat]

    @staticmethod
    def mutate(draw: Random, data: bytes, other: bytes) -> bytes:
        return change(draw, data, other, TOKENS)

    @staticmethod
    def check(path: Path) -> str:
        return read(["--data=x", "--config", str(path)], path.with_name("again.yaml"))


class Argv:
    """Inputs that are a command line: each argument ends with a zero byte."""

    @staticmethod
    def seeds() -> list[bytes]:
        lines = ["DIR -a resnet18 --mlp --moco-t 0.2 --aug-plus --cos -b 32"]
        lines += ["--data=x --schedule 1 2 --teacher t --refresh-epochs 0,5 -j 4"]
        return [b"".join(word.encode() + b"\0" for word in line.split()) for line in lines]

    @staticmethod
    def mutate(draw: Random, data: bytes, other: bytes) -> bytes:
        tokens = [flag + end for end in (b"\0", b"=") for flag in FLAGS]
        tokens += [value + b"\0" for value in VALUES]
        return change(draw, data, other, [*tokens, b"\0", b"--\0", b"-", b"--no-"])

    @staticmethod
    def check(path: Path) -> str:
        argv = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]
        return read(argv, path.with_name("again.yaml"))


def read(argv: list[str], again: Path) -> str:
    """Read options, and check that a YAML file of them reads as the same.

    RunError: the options are invalid.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = read_config(argv)
    except SystemExit as end:
        assert end.code == 0 and any(word.startswith(("-h", "--help")) for word in argv)
        return "help"
    options = dataclasses.asdict(config)
    del options["config"]
    again.write_text(yaml.safe_dump(options))
    reread = read_config(["--config", str(again)])
    assert dataclasses.replace(reread, config=config.config) == config
    return "options"
