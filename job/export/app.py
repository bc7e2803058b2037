"""Write the student of a checkpoint, without its head, as a file that other programs load.

python -m job.export CHECKPOINT OUTPUT [--format torchvision|timm|detectron2|onnx] [--force]
"""

import argparse
import os

from job.cli import Parser
from job.cluster import launch
from job.config import Config
from job.declare import convert, expand
from job.errors import RunError
from job.export.formats import ENDINGS, FORMATS
from job.export.network import Network, read_network
from job.export.origin import describe_origin
from job.files import whole_file
from job.networks import ARCHS

IMAGE_SIZE = "side of the training's images in pixels, which the file names "
IMAGE_SIZE += "(default: the run's, or 224)"


def main(argv: list[str] | None = None) -> None:
    """Run `job.export` on the command line's options."""
    with launch.reported_errors():
        given = build_parser().parse_args(argv)
        size = given.image_size
        if size is not None:
            size = convert(Config.__dataclass_fields__["image_size"], size, "--image-size")
        report = export(
            given.checkpoint,
            given.output,
            given.format,
            size,
            given.force,
            given.arch,
        )
        print(report)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="job.export", description=__doc__, formatter_class=form)
    text = "a run's, or any other file that --teacher takes"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=expand, help=text)
    text = f"the file to write; its ending decides the format: {', '.join(ENDINGS)}"
    parser.add_argument("output", metavar="OUTPUT", type=expand, help=text)
    text = "the format, for any ending"
    parser.add_argument("--format", choices=FORMATS, default="", help=text)
    text = "the network (default: as the file says)"
    parser.add_argument("-a", "--arch", choices=ARCHS, default="", help=text)
    parser.add_argument("--image-size", metavar="X", help=IMAGE_SIZE)
    parser.add_argument("--force", action="store_true", help="write over an OUTPUT that is there")
    return parser


def export(
    checkpoint: str,
    output: str,
    form: str = "",
    size: int | None = None,
    force: bool = False,
    arch: str = "",
) -> str:
    """Write `output`; return a report of what was written and how it is loaded.

    form: a name in FORMATS, or "" for what the ending says. size: of the training's images in
    pixels, or None for the checkpoint's. force: replace an existing file. arch: the network, or ""
    for what the checkpoint says. RunError: nothing was written.
    """
    form = form or ENDINGS.get(os.path.splitext(output)[1].lower(), "")
    if not form:
        problem = f"unknown ending; expected one of {', '.join(ENDINGS)}"
        raise RunError(f"{output}: {problem}. Rename it, or add --format {'|'.join(FORMATS)}")
    check_place(checkpoint, output, force)
    network, weights = read_network(checkpoint, arch, size)
    origin = describe_origin(checkpoint, network, weights)
    if form in network.refused:
        raise RunError(network.refused[form])
    remark = write(network, origin, output, form)
    epoch = "" if origin["epoch"] is None else f" of epoch {origin['epoch']}"
    size_mb = os.path.getsize(output) / 1e6
    load = FORMATS[form].load(network, output) + remark
    report = f"wrote {output}: {size_mb:.1f} MB, {network.arch}{epoch} for {form}"
    return f"{note(network, form, load)}{report}; load it with: {load}"


def note(network: Network, form: str, load: str) -> str:
    """Return a line about layers that must be replaced before loading, if there are any."""
    if not network.changes or network.changes not in load:
        return ""
    which = f"the small stem: net.conv1 and net.maxpool of {form}'s network"
    return f"{which} must be replaced before loading, as shown here\n"


def write(network: Network, origin: dict, output: str, form: str) -> str:
    """Write a network in a format; return what to remark. RunError: nothing was written."""
    try:
        with whole_file(output) as file:
            return FORMATS[form].write(file, network, origin)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror or error}", code=1) from None


def check_place(checkpoint: str, output: str, force: bool) -> None:
    """RunError: `output` cannot be written, or must not be."""
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise RunError(f"{output}: there is no folder {folder}: make it first")
    if os.path.realpath(output) == os.path.realpath(checkpoint):
        raise RunError(f"{output} is the checkpoint itself: name another file")
    if os.path.lexists(output) and not force:
        fix = "name another file, or write over it with --force"
        raise RunError(f"{output} is there already: {fix}")
