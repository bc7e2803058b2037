"""Time the kinds of work of a step, by clocks around the program's own functions.

- passes: forward of student, key encoder and teacher, and backward without the distillation's
- distillation: forward and backward of the distiller
- optimizer: its step, clearing gradients, gradient norm, key encoder's update, queue
- communication: the worker's waits for it
- threads: CPU time of Horovod's threads, which run on the same core during all of the above
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
        """Start a step."""
        self.spent = defaultdict(float)
        self.threads = other_threads()

    def seconds(self) -> dict[str, float]:
        """Return the seconds since `clear`, by kind."""
        return {kind: self.spent[kind] for kind in KINDS} | {
            "threads": other_threads() - self.threads
        }

    def time(self, kind: str, owner, name: str) -> None:
        """From now on, add the time of `owner.name` to `kind`."""
        work = getattr(owner, name)

        def timed(*arguments, **named):
            start = time.perf_counter()
            result = work(*arguments, **named)
            self.spent[kind] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    def divide_backward(self, mgd: MGDistiller) -> None:
        """From now on, time the backward pass.

        The distillation was computed last, so autograd starts with it.
        """

        def distilled(*gradients):
            self.distilled = time.perf_counter()

        def watch(norm, inputs, output):
            output.grad_fn.register_hook(distilled)

        for stage in mgd.stages:
            mgd.get_submodule(f"bn{stage}").register_forward_hook(watch)
        backward = torch.Tensor.backward

        def timed(tensor, *arguments, **named):
            self.distilled = start = time.perf_counter()
            backward(tensor, *arguments, **named)
            self.spent["distillation"] += self.distilled - start
            self.spent["passes"] += time.perf_counter() - self.distilled

        torch.Tensor.backward = timed


def other_threads() -> float:
    """Return the CPU seconds of all other threads so far: Horovod's and the watchdog's."""
    return time.process_time() - time.thread_time()
