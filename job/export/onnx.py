"""ONNX: images (B, 3, H, W) -> features (B, C) for any B, and the network's H and W."""

from typing import Any, BinaryIO

import torch

from job.errors import RunError
from job.export.network import OTHER_SIZE, Network
from job.export.origin import as_text

TOLERANCE = 1e-4  # of the largest feature


@torch.no_grad()
def write(file: BinaryIO, network: Network, origin: dict) -> str:
    """Write a file with the training's image size. Return its difference from torch, as text.

    RunError: a package is missing, torch cannot convert the network, or the features differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch's exporter uses it
    except ImportError as error:
        fix = "pip install '.[onnx]'"
        raise RunError(f"onnx needs {error.name}, which is not installed. {fix}") from None
    axes = {0: "batch"} if network.fixed_size else {0: "batch", 2: "height", 3: "width"}
    traced = (network.size, network.size) if network.fixed_size else OTHER_SIZE
    try:
        program = torch.onnx.export(
            network.body,
            (torch.zeros(2, 3, *traced),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=[{axis: torch.export.Dim(name) for axis, name in axes.items()}],
        )
    except torch.onnx.OnnxExporterError as error:
        first = next(filter(None, str(error).splitlines()), "no message")
        problem = f"torch cannot convert it: {first}"
        raise RunError(f"onnx: {network.arch}: {problem}. Use another format", code=1) from None
    assert program
    program.model.metadata_props.update(as_text(origin | {"image_size": network.size}))
    file.write(program.model_proto.SerializeToString())
    file.flush()
    session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
    difference = compare(session, network)
    return f"; differs from torch's by {difference:.0e} of the largest feature at most"


@torch.no_grad()
def compare(session: Any, network: Network) -> float:
    """Return onnxruntime's largest difference from torch, relative to the largest feature.

    session: onnxruntime's. RunError: the difference is over TOLERANCE.
    """
    random, size, largest = torch.Generator().manual_seed(0), network.size, 0.0
    shapes = [(3, size, size), (1, size, 2 * size // 3), (2, size // 2, size)]
    for B, H, W in shapes[: 1 if network.fixed_size else None]:
        images = torch.randn(B, 3, H, W, generator=random)
        try:
            expected = network.body(images)  # (B, C)
        except Exception:
            if (H, W) == (size, size):
                raise
            continue  # torch's network has a fixed or smallest size, too
        computed = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])  # (B, C)
        scale = expected.abs().max().clamp_min(1e-30)
        difference = ((computed - expected).abs().max() / scale).item()
        if not difference <= TOLERANCE:
            raise RunError(
                f"onnxruntime's features of {B} images of {H}x{W} pixels differ from torch's by "
                f"{difference:.1e} of the largest; expected at most {TOLERANCE:.0e}",
                code=1,
            )
        largest = max(largest, difference)
    return largest


def load(network: Network, path: str) -> str:
    """Return the statement that computes features by the file."""
    side = network.size
    shape = f"(B, 3, {side}, {side})" if network.fixed_size else "(B, 3, H, W)"
    return (
        f"onnxruntime.InferenceSession({path!r}).run(None, dict(images=images))  "
        f"# {shape} -> (B, {network.channels}); trained at {side}x{side}"
    )
