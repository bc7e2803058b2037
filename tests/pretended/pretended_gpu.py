"""A pretended GPU: tensors in CPU memory that report the device cuda:0.

Each operation is checked for errors of CUDA: tensors on two devices, and dtypes without a kernel.
Stalls are counted, at which the host waits for the device. Speed, streams and kernels are not
simulated.
"""

import collections
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from job.data.augment import row_constants

ROOT = os.path.join(Path(__file__).parents[2], "")
OURS = tuple(os.path.join(ROOT, package, "") for package in ("job", "mgd", "moco"))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# Operations without CUDA kernels for integers.
FLOATS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "native_batch_norm"}
FLOATS |= {"avg_pool2d", "_softmax", "_log_softmax"}
FLOATS |= {"_upsample_bilinear2d_aa", "upsample_bilinear2d"}
FLOATS |= {"linalg_eigh", "_linalg_eigh", "reflection_pad2d", "grid_sampler_2d"}
# Operations whose result is a Python number, or has a size that depends on values.
DATA_DEPENDENT = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}
DATA_DEPENDENT |= {"_unique2", "unique_dim", "unique_consecutive", "bincount"}
COPIES = {"_to_copy", "copy_", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def line_of_program() -> str:
    """Return the innermost line of this project's code, such as `job/train.py:150`."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}"


class Monitor:
    """Problems and stalls of the pretended GPU, each with the program's line.

    problems: errors that CUDA or NCCL would raise. copies: blocking copies, counted. waits:
    blocking collectives, counted.
    """

    def __init__(self):
        self.problems: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Clear the stalls."""
        self.copies: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def problem(self, text: str) -> None:
        """Record a problem."""
        self.problems.add(f"{line_of_program()}: {text}")

    def copy(self, text: str) -> None:
        """Count a blocking copy."""
        self.copies[f"{line_of_program()}: {text}"] += 1

    def wait(self, text: str) -> None:
        """Count a blocking collective."""
        self.waits[f"{line_of_program()}: {text}"] += 1


monitor = Monitor()


class Pretended(torch.Tensor):
    """A tensor that reports the device cuda:0, around one in CPU memory.

    Methods that copy to the CPU count as stalls. torch's own code treats it as a CPU tensor.
    """

    gpu_tensors: torch.Tensor  # the real tensor, in CPU memory

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        assert not isinstance(real, Pretended)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            requires_grad=real.requires_grad,
        )
        made.held = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {})

    def __repr__(self):
        return f"Pretended({self.held!r})"

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def cpu(self, *args, **kwargs):
        return self.to(CPU)

    def tolist(self):
        monitor.copy("tolist")
        return self.held.tolist()

    def to(self, *args, **kwargs):
        devices = [kwargs.pop("device", None), *args]
        where = next((each for each in devices if isinstance(each, str | torch.device)), None)
        if where is not None and torch.device(where).type == "cpu":
            if not kwargs.get("non_blocking"):
                monitor.copy("copy to the CPU")
            args = [each for each in args if not isinstance(each, str | torch.device)]
            kwargs.pop("non_blocking", None)
            real = self.held.detach().clone()
            return real.to(*args, **kwargs) if args or kwargs else real
        args = [each for each in args if not isinstance(each, str | torch.device)]
        return super().to(*args, **kwargs) if args or kwargs else self

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = Pretended(self.held.detach().clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        monitor.copy("saved")
        return self.held.detach().__reduce_ex__(protocol)


def mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Return a value with each object of a type replaced by `change` of it, also in lists."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(kind, change, each) for each in value)
    return value


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in values and in their lists."""
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)


@functools.cache
def described(func: Any) -> tuple[str, list[tuple[int, str]]]:
    """Return an operation's name, and the index and name of each argument that it changes."""
    schema = func._schema
    arguments = enumerate(schema.arguments)
    changed = [
        (n, each.name) for n, each in arguments if each.alias_info and each.alias_info.is_write
    ]
    return schema.name.removeprefix("aten::"), changed


def in_backward_pass() -> bool:
    """Return whether torch is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def operate(func: Any, args: tuple, kwargs: dict) -> Any:
    """Check an operation and count its stalls as on the device, and compute it on the CPU."""
    name, changed = described(func)
    tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
    gpu_tensors = [each for each in tensors if isinstance(each, Pretended)]
    device, on_device = kwargs.get("device"), bool(gpu_tensors)
    if device is not None:
        # torch's own code treats a pretended tensor as one on the CPU, and passes that device for
        # its copies and gradients. Python's .cpu() and .to("cpu") do not reach this function.
        of_torch = name == "_to_copy" or in_backward_pass()
        on_device = torch.device(device).type == "cuda" or (
            of_torch and len(gpu_tensors) == len(tensors)
        )
        kwargs = kwargs | {"device": CPU}
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": False}
    if on_device:
        check(name, args, kwargs, tensors, gpu_tensors)
    own = [mapped(Pretended, lambda each: each.held, each) for each in args]
    result = func(
        *own,
        **{key: mapped(Pretended, lambda each: each.held, each) for key, each in kwargs.items()},
    )
    # Return a changed argument as the given object, not as a new one.
    given = [args[n] if n < len(args) else kwargs.get(key) for n, key in changed]
    same = {id(getattr(each, "held", each)): each for each in tensors_in(given)}

    def named(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in same:
            return same[id(tensor)]
        return Pretended(tensor) if on_device else tensor

    return mapped(torch.Tensor, named, result)


def check(name: str, args: tuple, kwargs: dict, tensors: list, gpu_tensors: list) -> None:
    """Record the problems of an operation, and count its stalls."""
    others = [each for each in tensors if not isinstance(each, Pretended)]
    if name in COPIES:
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        source = args[1] if name == "copy_" else args[0]
        if others and not (non_blocking and is_pinned(source)):
            monitor.copy("copy to the device" if others[0] is source else "copy to the CPU")
        return
    if name in DATA_DEPENDENT:
        monitor.copy(name)
    if name in INDEXING and gpu_tensors:
        indices = [each for each in args[1] if isinstance(each, torch.Tensor)]
        for index in indices:
            if not isinstance(index, Pretended) and index.dim():
                monitor.copy("an index from the CPU")
            if index.dtype in (torch.bool, torch.uint8):
                monitor.copy("an index by a mask")
        if not isinstance(args[0], Pretended):
            monitor.problem(f"{name}: a CPU tensor, indexed by one of the device")
            return
        others = [each for each in others if not any(each is index for index in indices)]
    if gpu_tensors and any(each.dim() for each in others):
        shapes = [tuple(each.shape) for each in others]
        monitor.problem(f"{name}: tensors on two devices, on the CPU {shapes}")
    base = name.removesuffix("_backward")
    if base in FLOATS and any(not each.is_floating_point() for each in gpu_tensors[:1]):
        monitor.problem(f"{name}: no kernel for {gpu_tensors[0].dtype}")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in Generator.on_gpu:
        monitor.problem(f"{name}: a CPU generator for a tensor of the device")


class Mode(TorchDispatchMode):
    """Handles all operations, including those that only make tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator that reports the device for which it is made.

    on_gpu: the generators of the GPU, by the address of their C++ object.
    """

    on_gpu: dict[int, torch.Generator] = {}

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.on_gpu[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        """The device for which it is made."""
        return CUDA if self._cdata in self.on_gpu else CPU


pinned: dict[int, torch.UntypedStorage] = {}  # storages in page-locked memory, by address


def pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Return a copy in page-locked memory."""
    assert not isinstance(tensor, Pretended)
    copied = tensor.clone()
    pinned[copied.untyped_storage().data_ptr()] = copied.untyped_storage()
    return copied


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """Return whether a tensor is in page-locked memory."""
    return not isinstance(tensor, Pretended) and tensor.untyped_storage().data_ptr() in pinned


class Autocast(torch.autocast):
    """The CPU's autocast, which torch applies to pretended tensors."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu", *args, **kwargs)


def on_device(make: Callable) -> Callable:
    """Return a version of `torch.tensor` or `torch.as_tensor` that does not start CUDA."""

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = data.to(**kwargs) if isinstance(data, Pretended) else make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return tensor


CUDA_FUNCTIONS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda index: None,
    "get_device_name": lambda index=0: "a pretended GPU",
    "get_device_properties": lambda index=0: SimpleNamespace(uuid="pretended"),
    "_lazy_init": lambda: None,
}


@contextlib.contextmanager
def pretended() -> Iterator[Monitor]:
    """Give torch a pretended GPU and yield its problems and stalls, cleared at the start."""
    monitor.problems.clear()
    monitor.clear()
    convert = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, function in CUDA_FUNCTIONS.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "tensor", on_device(torch.tensor))
        patch.setattr(torch, "as_tensor", on_device(torch.as_tensor))
        patch.setattr(torch.Tensor, "pin_memory", pin)
        patch.setattr(torch.Tensor, "is_pinned", is_pinned)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with Mode():
                yield monitor
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(convert)
            pinned.clear()
            Generator.on_gpu.clear()
            row_constants.cache_clear()
