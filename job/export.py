"""A checkpoint's student backbone, the query encoder without its head, as a file that other programs load.

python -m job.export CHECKPOINT OUTPUT [--format torchvision|timm|detectron2|onnx] [--force]
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torchvision.models import ResNet

from job.checkpoints.foreign import Backbone, read_backbone
from job.cli import Parser
from job.cluster import launch
from job.config import Config
from job.data.augment import MEAN, STD
from job.declare import convert, expand
from job.errors import RunError
from job.files import whole_file
from job.networks import ARCHS, WIDTH, build_resnet

ENDINGS = {".pth": "torchvision", ".pt": "torchvision", ".safetensors": "timm", ".pkl": "detectron2", ".onnx": "onnx"}
SMALL_STEM = "net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False); net.maxpool = torch.nn.Identity()"
DETECTRON2_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [  # from torchvision's
    (r"^(?=conv|bn)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
]
ONNX_TOLERANCE = 1e-4  # of the largest feature
ONNX_TRACED = (2, 3, 96, 128)  # (B, 3, H, W); large enough that no layer has a side of 1, which torch would fix


def write_torchvision(file: BinaryIO, net: ResNet, origin: dict, size: int) -> str:
    """Write a state dict with `origin` as its attribute: it stays a mapping of names to tensors alone."""
    state = net.state_dict()
    state.origin = origin  # type: ignore[attr-defined]  # it is an OrderedDict
    torch.save(state, file)
    return loading(origin, f"torchvision.models.{origin['arch']}()", "torch.load({!r}, weights_only=True), strict=False")


def write_timm(file: BinaryIO, net: ResNet, origin: dict, size: int) -> str:
    """Write safetensors: timm names its ResNets' tensors as torchvision does."""
    file.write(safetensors.torch.save(net.state_dict(), metadata={"format": "pt", **as_text(origin)}))
    return loading(origin, f"timm.create_model('{origin['arch']}', num_classes=0)", "safetensors.torch.load_file({!r})")


def write_detectron2(file: BinaryIO, net: ResNet, origin: dict, size: int) -> str:
    """Write a pickle of arrays by Detectron2's names; in its origin, the options of Detectron2 that make this network.

    RunError: it has the small stem, which Detectron2 lacks.
    """
    if origin["stem"] == "small":
        raise RunError("detectron2's ResNets begin with a 7x7 convolution and pooling, this one with the small stem: use onnx")
    depth = int(re.findall(r"\d+", origin["arch"])[0])
    options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_IN_1X1", False]
    options += ["MODEL.RESNETS.NUM_GROUPS", net.groups, "MODEL.RESNETS.WIDTH_PER_GROUP", net.base_width]
    options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64] if depth < 50 else []
    for name, values in (("MEAN", MEAN), ("STD", STD)):
        options += [f"MODEL.PIXEL_{name}", [round(255 * value, 3) for value in values]]
    options += ["INPUT.FORMAT", "RGB"]
    arrays = {detectron2_name(name): value.numpy() for name, value in net.state_dict().items() if value.is_floating_point()}
    content = {"model": arrays, "__author__": origin["program"], "matching_heuristics": True}
    pickler = pickle.Pickler(file, protocol=4)  # readable with older Pythons, and with NumPy 1, as NumPy 2's own form is not
    pickler.dispatch_table = {np.ndarray: lambda array: (np.ndarray, (array.shape, "float32", bytearray(array)))}
    pickler.dump(content | {"origin": origin | {"detectron2": options}})
    return "cfg.merge_from_list(['MODEL.WEIGHTS', {!r}, " + repr(options)[1:] + ")"


@torch.no_grad()
def write_onnx(file: BinaryIO, net: ResNet, origin: dict, size: int) -> str:
    """Write images (B, 3, H, W) -> features (B, C) for any B, H and W; note the training's size.

    RunError: a package is missing, or the file does not compute what `net` does.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch's exporter uses it
    except ImportError as error:
        raise RunError(f"onnx needs {error.name}, which is not installed: pip install '.[onnx]'") from None
    axes = {0: "batch", 2: "height", 3: "width"}
    program = torch.onnx.export(
        net,
        (torch.zeros(ONNX_TRACED),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=[{axis: torch.export.Dim(name) for axis, name in axes.items()}],
    )
    assert program
    program.model.metadata_props.update(as_text(origin | {"image_size": size}))
    file.write(program.model_proto.SerializeToString())
    file.flush()
    session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
    random, off, channels = torch.Generator().manual_seed(0), 0.0, 0
    for B, H, W in ((3, size, size), (1, size, 2 * size // 3), (2, size // 2, size)):
        images = torch.randn(B, 3, H, W, generator=random)
        expected = net(images)  # (B, C)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])  # (B, C)
        largest, channels = expected.abs().max().clamp_min(1e-30), expected.shape[1]
        difference = ((found - expected).abs().max() / largest).item()
        if not difference <= ONNX_TOLERANCE:
            raise RunError(
                f"onnxruntime's features of {B} images of {H}x{W} pixels differ from torch's by "
                f"{difference:.1e} of the largest; expected at most {ONNX_TOLERANCE:.0e}",
                code=1,
            )
        off = max(off, difference)
    return (
        "onnxruntime.InferenceSession({!r}).run(None, dict(images=images))  "
        f"# (B, 3, H, W) -> (B, {channels}); trained at {size}x{size}; "
        f"differs from torch's by {off:.0e} of the largest feature at most"
    )


# Each writes to an open file, and returns the statements that load {!r}, the file's path.
FORMATS = {"torchvision": write_torchvision, "timm": write_timm, "detectron2": write_detectron2, "onnx": write_onnx}


def loading(origin: dict, net: str, state: str) -> str:
    """The statements that load `state` into `net`, with the stem that it needs."""
    return f"net = {net}; {SMALL_STEM + '; ' if origin['stem'] == 'small' else ''}net.load_state_dict({state})"


def detectron2_name(name: str) -> str:
    """layer1.0.bn2.bias -> res2.0.conv2.norm.bias, and so on."""
    for pattern, new in DETECTRON2_NAMES:
        name = re.sub(pattern, new, name)
    return name


def as_text(origin: dict) -> dict[str, str]:
    """Values that are no text as JSON: safetensors and ONNX hold text alone."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in origin.items()}


def last_part(value: Any) -> Any:
    """An option's value, of paths the last part alone: the file may go to others."""
    if isinstance(value, list):
        return [last_part(item) for item in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) else value


def where_from(path: str, backbone: Backbone) -> dict:
    """Where an exported file comes from, and the mean and deviation of its network's pixels: JSON's types alone."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    program = "moco-mgd"
    with contextlib.suppress(metadata.PackageNotFoundError):
        program += f" {metadata.version('moco-mgd')}"
    origin: dict[str, Any] = {"source": os.path.basename(os.path.realpath(path)), "sha256": sha256}
    origin |= {"arch": backbone.arch, "stem": backbone.stem, "width": backbone.width}
    origin |= {"epoch": backbone.meta["epoch"], "program": program, "mean": MEAN, "std": STD}
    if config := backbone.meta["config"]:
        origin["config"] = {key: last_part(value) for key, value in config.items()}
    if backbone.stem == "small":
        origin["note"] = f"small stem: {SMALL_STEM}"
    return json.loads(json.dumps(origin, default=str, skipkeys=True))


def check_place(checkpoint: str, output: str, force: bool) -> None:
    """RunError: `output` cannot be written, or must not be."""
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise RunError(f"{output}: there is no folder {folder}: make it first")
    if os.path.realpath(output) == os.path.realpath(checkpoint):
        raise RunError(f"{output} is the checkpoint itself: name another file")
    if os.path.lexists(output) and not force:
        raise RunError(f"{output} is there already: name another file, or write over it with --force")


def export(checkpoint: str, output: str, form: str = "", size: int | None = None, force: bool = False, arch: str = "") -> str:
    """Write `output`; return what was written and how it is loaded. RunError: nothing was."""
    form = form or ENDINGS.get(os.path.splitext(output)[1].lower(), "")
    if not form:
        raise RunError(f"{output} ends in none of {', '.join(ENDINGS)}: say what it is to be with --format {'|'.join(FORMATS)}")
    check_place(checkpoint, output, force)
    backbone = read_backbone(checkpoint, arch, arch_flag="--arch")
    origin = where_from(checkpoint, backbone)
    if backbone.width != WIDTH and form != "onnx":
        raise RunError(f"{form}'s {backbone.arch} has {WIDTH} channels in its first stage, this one {backbone.width}: use onnx")
    net = build_resnet(backbone.arch, stem=backbone.stem, width=backbone.width).eval()
    net.fc = nn.Identity()  # type: ignore[assignment]
    net.load_state_dict(backbone.state)
    size = size or backbone.meta["config"].get("image_size") or 224
    try:
        with whole_file(output) as file:
            load = FORMATS[form](file, net, origin, size).format(output)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror or error}", code=1) from None
    note = f"the small stem: net.conv1 and net.maxpool of {form}'s network must be replaced before loading, as shown here\n"
    epoch = "" if origin["epoch"] is None else f" of epoch {origin['epoch']}"
    report = f"wrote {output}: {os.path.getsize(output) / 1e6:.1f} MB, {backbone.arch}{epoch} for {form}; load it with: {load}"
    return note + report if SMALL_STEM in load else report


def main(argv: list[str] | None = None) -> None:
    """Run `job.export` on the command line's options."""
    with launch.reported_errors():
        parser = Parser(prog="job.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "checkpoint", metavar="CHECKPOINT", type=expand, help="a run's, or any other file that --teacher takes"
        )
        parser.add_argument("output", metavar="OUTPUT", type=expand, help=f"its ending tells the format: {', '.join(ENDINGS)}")
        parser.add_argument("--format", choices=FORMATS, default="", help="the format, whatever the ending")
        parser.add_argument("-a", "--arch", choices=ARCHS, default="", help="the network (default: as the file says)")
        size_help = "side of the training's images in pixels, noted in onnx (default: the run's, or 224)"
        parser.add_argument("--image-size", metavar="X", help=size_help)
        parser.add_argument("--force", action="store_true", help="write over an OUTPUT that is there")
        given = parser.parse_args(argv)
        size = given.image_size and convert(Config.__dataclass_fields__["image_size"], given.image_size, "--image-size")
        print(export(given.checkpoint, given.output, given.format, size, given.force, given.arch))


if __name__ == "__main__":
    main()
