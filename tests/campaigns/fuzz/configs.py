"""Options from YAML files and command lines, as people and programs can get them wrong."""

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from random import Random

import yaml
from mutations import change

from job.config import Config, read_config

WORDS = [b"\n", b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"<<: ", b"'", b'"', b"|\n ", b"? ", b"\t", b"--- ", b"~",
         b"!!python/object:os.system ", b"!!bool ", b"!!int ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!float ",
         b"2020-13-45", b"0x", b"0b", b"1_0", b"1:30", b".inf", b".nan", b"1e999", b"-1", b"9" * 20, b"9" * 5000, b"null",
         b"%YAML 9.9\n", b"\xff", b"\xe2\x80\xa8", b"\x00", b"\xed\xa0\x80", b"[" * 2000, b"{a: " * 300,
         b"moco: {k: ", b"mgd: *a", b"data:\n "]  # fmt: skip
FLAGS = [
    b"--" + f.name.replace("_", "-").encode()
    for f in dataclasses.fields(Config)
    if f.name != "config"
]
VALUES = [b"0", b"-1", b"1e-3", b"nan", b"inf", b"1_0", b"\xd9\xa3", b"0,5", b"every:2", b"500steps", b"9" * 5000, b"\xff", b"",
          b"log", b"resnet50", b"small"]  # fmt: skip


class Yaml:
    """The input is a YAML file."""

    @staticmethod
    def seeds() -> list[bytes]:
        presets = [path.read_bytes() for path in sorted(Path("job/presets").glob("*.yaml"))]
        options = yaml.safe_dump(dataclasses.asdict(Config(data="x"))).replace("config: []\n", "")
        grouped = b"moco: &a {k: 9, mlp: true}\nmgd:\n  stages: [1, 2]\n  refresh_epochs: [0, 5]\ndata: {data: x}\nlr: 1\n"
        alone = b"lr: 0.1\nschedule: [1, 2]\nrefresh_epochs: [0, 5]\nout: &a 'x'\nteacher: *a\n"
        return [*presets, options.encode(), grouped, alone]

    @staticmethod
    def mutate(draw: Random, data: bytes, other: bytes) -> bytes:
        return change(draw, data, other, WORDS)

    @staticmethod
    def check(path: Path) -> str:
        return read(["--data=x", "--config", str(path)], path.with_name("again.yaml"))


class Argv:
    """The input is a command line, its arguments behind one another with a zero after each."""

    @staticmethod
    def seeds() -> list[bytes]:
        lines = ["DIR -a resnet18 --mlp --moco-t 0.2 --aug-plus --cos -b 32"]
        lines += ["--data=x --schedule 1 2 --teacher t --refresh-epochs 0,5 -j 4"]
        return [b"".join(word.encode() + b"\0" for word in line.split()) for line in lines]

    @staticmethod
    def mutate(draw: Random, data: bytes, other: bytes) -> bytes:
        words = (
            [flag + b"\0" for flag in FLAGS]
            + [flag + b"=" for flag in FLAGS]
            + [value + b"\0" for value in VALUES]
        )
        return change(draw, data, other, [*words, b"\0", b"--\0", b"-", b"--no-"])

    @staticmethod
    def check(path: Path) -> str:
        argv = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]
        return read(argv, path.with_name("again.yaml"))


def read(argv: list[str], again: Path) -> str:
    """Options that read back the same when they are written to a file. RunError: there are none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = read_config(argv)
    except SystemExit as end:
        assert end.code == 0 and any(word.startswith(("-h", "--help")) for word in argv)
        return "help"
    options = dataclasses.asdict(config)
    del options["config"]
    again.write_text(yaml.safe_dump(options))
    assert (
        dataclasses.replace(read_config(["--config", str(again)]), config=config.config) == config
    )
    return "options"
