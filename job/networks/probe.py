"""The features of networks other than torchvision's ResNets, detected by one forward pass."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from job.errors import RunError
from job.networks import own, timm_networks
from job.networks.encoder import Maps, Pass
from job.networks.layout import make_safe, weights_to_channels_last
from job.networks.names import is_own
from job.networks.outline import DEPTH, Outline

STAGES = list(range(1, DEPTH + 1))
# timm's errors if it cannot build a network for images of a size.
UNBUILT = (AssertionError, TypeError, ValueError, RuntimeError, ZeroDivisionError)
PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)  # layers without an effect here
SHORTCUTS = ("downsample", "shortcut")  # their norm is not the last one before the sum


class Probe(NamedTuple):
    """The features of a network, and how they are computed.

    norms: {stage: name} of the batch norms after which a stage only adds its shortcut. unused:
    names of the parameters, except frozen ones, on which the pooled features do not depend.
    channels_last: whether the network supports this layout.
    """

    outline: Outline
    run: Pass
    norms: dict[int, str]
    unused: frozenset[str]
    channels_last: bool


def build_body(arch: str, image_size: int) -> nn.Module:
    """Return a new network, (b, 3, H, W) -> (b, C). RunError: it cannot be built for that size."""
    if is_own(arch):
        return own.build_body(arch).apply(make_safe)
    try:
        return timm_networks.build_body(arch, image_size).apply(make_safe)
    except UNBUILT as error:
        raise RunError(refusal(arch, image_size, error)) from None


def refusal(arch: str, size: int, error: Exception) -> str:
    """Return the error message of a network that cannot process images of a size."""
    cause = str(error).split("\n")[0] or type(error).__name__
    return f"{arch} cannot process {size} x {size} pixels: {cause}. Choose another --image-size"


def probe(arch: str, image_size: int) -> Probe:
    """Probe a network with images of `image_size` pixels.

    A user's function may change within a process, as in a notebook: it is probed again.
    RunError: the network cannot process such images, or does not return pooled features (b, C).
    """
    return probe_once(arch, image_size) if is_own(arch) else probe_timm(arch, image_size)


@torch.enable_grad()
def probe_once(arch: str, image_size: int) -> Probe:
    """Build a network and probe it. RunError: as `probe`."""
    with torch.random.fork_rng(devices=[]):
        body = build_body(arch, image_size).eval()
    run: Pass = own.own_pass
    if not is_own(arch):
        run = timm_networks.find_pass(body)
    images = torch.linspace(-1, 1, 3 * image_size**2).view(1, 3, image_size, image_size)
    trace = Trace(body)
    try:
        plain, _ = run(body, images, [])
    except Exception as error:
        raise RunError(refusal(arch, image_size, error)) from None
    if not torch.is_tensor(plain) or plain.ndim != 2:
        shown = tuple(plain.shape) if torch.is_tensor(plain) else type(plain).__name__
        raise RunError(f"{arch}: its features are {shown}; expected pooled features (b, C)")
    try:
        pooled, maps = trace.watch(run, images)
        fits = all(each.ndim == 4 for each in maps.values()) and same(pooled, plain)
    except Exception:  # some networks of timm list maps that they cannot compute
        fits = False
    if not fits:
        run, maps, pooled = functools.partial(without_maps, run), {}, plain
    parameters = {name: each for name, each in body.named_parameters() if each.requires_grad}
    unused = without_gradient(pooled, parameters)
    beyond = without_gradient(maps[DEPTH], parameters) - unused if maps else set()
    shapes = {stage: tuple(each.shape[1:]) for stage, each in maps.items()}
    outline = Outline(pooled.shape[1], shapes, min(beyond, default=""))  # type: ignore[arg-type]
    norms = trace.norms(maps)
    if not (channels_last := runs_channels_last(body, run, images, pooled)):
        run = functools.partial(with_contiguous_images, run)
    return Probe(outline, run, norms, frozenset(unused), channels_last)


probe_timm = functools.cache(probe_once)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two computations of the pooled features are the same, to rounding."""
    return one.shape == other.shape and bool((one - other).norm() <= 1e-3 * one.norm() + 1e-5)


@torch.no_grad()
def runs_channels_last(
    body: nn.Module, run: Pass, images: torch.Tensor, pooled: torch.Tensor
) -> bool:
    """Return whether a network has the same features if images and weights are channels last.

    A `view` of them, or of maps, can fail, and some views fail only with several images. Training
    mode is not tried.
    """
    body.apply(weights_to_channels_last)
    pair = images.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)
    try:
        return all(same(run(body, pair, stages)[0][:1], pooled) for stages in ([], STAGES))
    except Exception:
        return False


def with_contiguous_images(
    run: Pass, body: nn.Module, images: torch.Tensor, stages: list[int]
) -> tuple[torch.Tensor, Maps]:
    """Return the features of images that are made contiguous."""
    return run(body, images.contiguous(), stages)


def without_maps(
    run: Pass, body: nn.Module, images: torch.Tensor, stages: list[int]
) -> tuple[torch.Tensor, Maps]:
    """Return the pooled features only."""
    return run(body, images, [])


def without_gradient(output: torch.Tensor, parameters: dict[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters on which an output does not depend."""
    if not output.requires_grad:
        return set(parameters)
    values = list(parameters.values())
    gradients = torch.autograd.grad(output.sum(), values, retain_graph=True, allow_unused=True)
    return {name for name, each in zip(parameters, gradients, strict=True) if each is None}


class Trace:
    """The layers of a network in the order of their passes."""

    def __init__(self, body: nn.Module):
        self.body, self.last = body, ""
        self.outputs: list[tuple[torch.Tensor, str]] = []  # with the last layer before each

    def watch(self, run: Pass, images: torch.Tensor) -> tuple[torch.Tensor, Maps]:
        """Return the pooled features and all maps of a pass."""
        named = [(name, module) for name, module in self.body.named_modules() if name]
        hooks = [
            each.register_forward_hook(functools.partial(self.note, name)) for name, each in named
        ]
        try:
            return run(self.body, images, STAGES)
        finally:
            for hook in hooks:
                hook.remove()

    def note(self, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        """Note a module's output after its pass."""
        if isinstance(module, PASSING):
            return
        if not list(module.children()) or isinstance(module, nn.BatchNorm2d):
            self.last = name
        if torch.is_tensor(output):
            self.outputs.append((output, self.last))

    def norms(self, maps: Maps) -> dict[int, str]:
        """Return the names of the batch norms in which the stages of `maps` end."""
        found = {}
        for stage, each in maps.items():
            # The last one, because an in-place activation returns the tensor of the norm before it.
            name = next((last for output, last in reversed(self.outputs) if output is each), "")
            if name and is_plain_norm(self.body.get_submodule(name)):
                if not any(part in name for part in SHORTCUTS):
                    found[stage] = name
        return found


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm with weights and without an activation."""
    after = all(isinstance(child, nn.Identity) for child in module.children())
    return isinstance(module, nn.BatchNorm2d) and module.affine and after
