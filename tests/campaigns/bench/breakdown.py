"""Where the time of a step goes: clocks around what the program itself calls, without a change to the program.

passes: forward of student, key encoder and teacher, and backward but for the distillation's; distillation: the distiller,
forward and backward; optimizer: its step and clearing, gradient norm, key encoder's update, queue; communication: what
the worker waits for it. Horovod's own threads compute beside all that, on the same core: `threads` is their CPU time.
"""

import time
from collections import defaultdict

import torch

from job.cluster import comm
import moco.model
from mgd.distiller import MGDistiller
from job.training import Training

KINDS = ("passes", "distillation", "optimizer", "communication")


class Breakdown:
    """Seconds of a step by kind."""

    def __init__(self, training: Training):
        net, [distiller] = training.framework.module, training.distillation.distillers
        for network in (net.encoder_q, net.encoder_k, training.distillation.networks.teacher.net):
            self.time("passes", network, "forward")
        for name in ("targets", "forward"):
            self.time("distillation", distiller.module, name)
        for name in ("begin_exchange", "wait", "begin_gather"):
            self.time("communication", comm, name)
        self.time("communication", training.gradients, "wait")
        for name in ("clear", "norm"):
            self.time("optimizer", training.gradients, name)
        self.time("optimizer", training.optimizer, "step")
        self.time("optimizer", net, "enqueue")
        self.time("optimizer", moco.model, "update_by_momentum")
        self.divide_backward(distiller.module)
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.spent = defaultdict(float)
        self.threads = other_threads()

    def seconds(self) -> dict[str, float]:
        """What was spent since `clear`."""
        return {kind: self.spent[kind] for kind in KINDS} | {
            "threads": other_threads() - self.threads
        }

    def time(self, kind: str, owner, name: str) -> None:
        """Note from now on the time that `owner.name` takes."""
        work = getattr(owner, name)

        def timed(*arguments, **named):
            begun = time.perf_counter()
            result = work(*arguments, **named)
            self.spent[kind] += time.perf_counter() - begun
            return result

        setattr(owner, name, timed)

    def divide_backward(self, mgd: MGDistiller) -> None:
        """Note the time of the backward pass: autograd goes through the distillation, which was computed last, first of all."""

        def distilled(*gradients):
            self.distilled = time.perf_counter()

        def watch(norm, inputs, output):
            output.grad_fn.register_hook(distilled)

        for stage in mgd.stages:
            mgd.get_submodule(f"bn{stage}").register_forward_hook(watch)
        backward = torch.Tensor.backward

        def timed(tensor, *arguments, **named):
            self.distilled = begun = time.perf_counter()
            backward(tensor, *arguments, **named)
            self.spent["distillation"] += self.distilled - begun
            self.spent["passes"] += time.perf_counter() - self.distilled

        torch.Tensor.backward = timed


def other_threads() -> float:
    """CPU seconds so far of this process's threads but the calling one: Horovod's, and the watchdog's."""
    return time.process_time() - time.thread_time()
