"""Write the student of a checkpoint, without its head, as a file that other programs load.

python -m job.export CHECKPOINT OUTPUT [--format torchvision|timm|detectron2|onnx] [--no-card]
    [--force]
"""

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from job.checkpoints import hub
from job.cli import Parser
from job.cluster import exits
from job.config import Config
from job.declare import convert, expand
from job.errors import RunError
from job.export.card import card_path, write_card
from job.export.formats import ENDINGS, FORMATS
from job.export.network import Network, read_network
from job.export.origin import describe_origin
from job.files import open_regular, whole_file

IMAGE_SIZE = "side of the training's images in pixels, to store in the file "
IMAGE_SIZE += "(default: the run's, or 224)"
OPTIONS = Config.__dataclass_fields__


def main(argv: list[str] | None = None) -> None:
    """Run `job.export` on the command line's options."""
    with exits.reported_errors():
        given = build_parser().parse_args(argv)
        size = given.image_size
        if size is not None:
            size = convert(OPTIONS["image_size"], size, "--image-size")
        if given.arch:
            convert(OPTIONS["arch"], given.arch, "--arch")
        report = export(
            given.checkpoint,
            given.output,
            given.format,
            size,
            given.force,
            given.arch,
            not given.no_card,
        )
        print(report)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="job.export", description=__doc__, formatter_class=form)
    text = "a run's, or any other file that --teacher reads"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=expand, help=text)
    text = f"the file to write. Its ending decides the format: {', '.join(ENDINGS)}"
    parser.add_argument("output", metavar="OUTPUT", type=expand, help=text)
    text = "the format (default: by the ending of OUTPUT)"
    parser.add_argument("--format", choices=FORMATS, default="", help=text)
    text = "the network, also timm/NAME and package.module:function (default: the file's)"
    parser.add_argument("-a", "--arch", default="", help=text)
    parser.add_argument("--image-size", metavar="X", help=IMAGE_SIZE)
    text = "overwrite OUTPUT and its companion files if they exist"
    parser.add_argument("--force", action="store_true", help=text)
    text = "write no model card (OUTPUT's name with .md)"
    parser.add_argument("--no-card", action="store_true", help=text)
    return parser


def export(
    checkpoint: str,
    output: str,
    form: str = "",
    size: int | None = None,
    force: bool = False,
    arch: str = "",
    card: bool = True,
) -> str:
    """Write `output` and its model card. Return a report of the file and how it is loaded.

    form: a name in FORMATS, or "" for the ending's. size: of the training's images in pixels, or
    None for the checkpoint's. force: replace an existing file. arch: the network, or "" for the
    checkpoint's. card: write the card. RunError: `output` was not written, or the message names a
    companion file that was not.
    """
    form = form or ENDINGS.get(os.path.splitext(output)[1].lower(), "")
    if not form:
        problem = f"unknown ending; expected one of {', '.join(ENDINGS)}"
        raise RunError(f"{output}: {problem}. Rename it, or add --format {'|'.join(FORMATS)}")
    if checkpoint.startswith(hub.PREFIX):
        fetched = hub.fetch(checkpoint)
        checkpoint, arch = fetched.path, arch or fetched.arch
    check_place(checkpoint, output, force)
    network, weights = read_network(checkpoint, arch, size)
    origin = describe_origin(checkpoint, network, weights)
    if form in network.refused:
        raise RunError(network.refused[form])
    companions = companion_files(network, output, form)
    if card:
        content = write_card(network, weights, origin, checkpoint, output, form)
        companions[card_path(output)] = content
    for path, content in companions.items():
        check_companion(checkpoint, output, path, content, force)
    remark = write(network, origin, output, form, companions)
    epoch = "" if origin["epoch"] is None else f" of epoch {origin['epoch']}"
    size_mb = os.path.getsize(output) / 1e6
    load = FORMATS[form].load(network, output) + remark
    report = f"wrote {output}: {size_mb:.1f} MB, {network.arch}{epoch} for {form}"
    names = ", ".join(map(os.path.basename, companions))
    also = f", with {names}" if names else ""
    return f"{note(network, form, load)}{report}{also}; load it with: {load}"


def note(network: Network, form: str, load: str) -> str:
    """Return a line about layers that must be replaced before loading, or ""."""
    if not network.changes or network.changes not in load:
        return ""
    which = f"the small stem: net.conv1 and net.maxpool of {form}'s network"
    return f"{which} must be replaced before loading, as shown here\n"


def companion_files(network: Network, output: str, form: str) -> dict[str, bytes]:
    """Return {path: content} of the further files in the folder of `output`."""
    folder = os.path.dirname(output)
    companions = FORMATS[form].companions(network)
    return {os.path.join(folder, name): content for name, content in companions.items()}


def write(
    network: Network,
    origin: dict,
    output: str,
    form: str,
    companions: Mapping[str, bytes],
) -> str:
    """Write a network in a format, and its companion files. Return a remark, or "".

    Each file appears when it is complete, `output` first. RunError: a file cannot be written.
    """
    with contextlib.ExitStack() as files:
        for path, content in companions.items():
            file = files.enter_context(written(path))
            file.write(content)
            file.flush()
        return FORMATS[form].write(files.enter_context(written(output)), network, origin)


@contextlib.contextmanager
def written(path: str) -> Iterator[BinaryIO]:
    """Return a file that appears at `path` when it is complete. RunError: it cannot be written."""
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}", code=1) from None


def check_place(checkpoint: str, output: str, force: bool) -> None:
    """RunError: `output` cannot be written, exists, or is the checkpoint."""
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise RunError(f"{output}: no folder {folder}; expected an existing one. Make it first")
    if os.path.realpath(output) == os.path.realpath(checkpoint):
        raise RunError(f"{output}: the checkpoint itself; expected another file")
    if os.path.lexists(output) and not force:
        raise RunError(f"{output}: exists; expected a new file. Choose another, or add --force")


def check_companion(checkpoint: str, output: str, path: str, content: bytes, force: bool) -> None:
    """RunError: a companion of `output` must not be written. One with this content may exist."""
    if os.path.realpath(path) in map(os.path.realpath, (checkpoint, output)):
        raise RunError(f"{output}: {path} is another file of this export; expected another name")
    if os.path.lexists(path) and not force and not has_content(path, content):
        keep = ", keep it with --no-card" if path == card_path(output) else ""
        fix = f"Choose another OUTPUT{keep}, or add --force"
        raise RunError(f"{path}: exists with other content; expected a new file. {fix}")


def has_content(path: str, content: bytes) -> bool:
    """Whether a file can be read and has this content."""
    try:
        with open_regular(path, len(content)) as file:
            return file.read() == content
    except OSError:
        return False
