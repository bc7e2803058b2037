"""A step on the GPU against the same step on the CPU, in float32 without TF32.

The tolerance is measured, not chosen. Both devices round each operation to float32, but sum in
different orders. To measure the effect of such roundings on the CPU, change each weight by one
rounding (2**-24 of its size, with random signs) and repeat the step. The GPU's distance from the
CPU may be ROOM times this effect. The last test shows that the tolerance rejects weights in TF32,
whose rounding is 2**-11.
"""

import contextlib

import pytest
import torch

from job.engine.run import Run
from steps import build_training, train

B = 8  # images
SEEDS = 3  # of random signs
ROOM = 30  # for several hundred roundings between a weight and a loss
ROUNDING = 2.0**-24
WAYS = {
    "moco": {},
    "mgd": {"teacher": True, "loss_share": 0.0, "loss_factor": 1e4},
    "simreg": {"teacher": True, "distill": ["simreg"], "loss_share": 0.0, "loss_factor": 1.0},
    "simsiam": {"framework": "simsiam", "dim": 64, "pred_dim": 16},
}


@contextlib.contextmanager
def settings(**values):
    """Set torch's flags of float32 in a block."""
    before = {}
    flags = {"cudnn": torch.backends.cudnn, "matmul": torch.backends.cuda.matmul}
    for name, value in values.items():
        before[name] = flags[name].allow_tf32
        flags[name].allow_tf32 = value
    try:
        yield
    finally:
        for name, value in before.items():
            flags[name].allow_tf32 = value


@pytest.fixture
def results(size, network, teacher, tmp_path, monkeypatch):
    """A function that runs a step on a device and returns its losses and the student's update.

    change: a function that changes each weight before the step.
    """
    width = int(network[network.index("--width") + 1])
    numbers = iter(range(1000))

    def results(way, device, change=lambda value: value):
        options = dict(WAYS[way])
        if options.pop("teacher", False):
            options["teacher"] = str(teacher)
        folder = tmp_path / str(next(numbers))
        generator = torch.Generator().manual_seed(3)
        both = torch.randint(256, (2, B, 3, size, size), dtype=torch.uint8, generator=generator)
        with monkeypatch.context() as patch, settings(cudnn=False, matmul=False):
            if torch.device(device).type == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            with Run(str(folder / "run"), keep=1) as run:
                assert run.device.type == torch.device(device).type
                options |= dict(image_size=size, batch_size=B, width=width, moco_k=64, lr=0.1)
                training = build_training(run, folder / "images", **options)
                student = training.framework.module
                with torch.no_grad():
                    for value in training.trained.parameters():
                        value.copy_(change(value))
                before = [value.detach().clone() for value in student.parameters()]
                journal = train(training, [list(both.to(run.device))])
                pairs = zip(student.parameters(), before, strict=True)
                update = torch.cat([(now.detach() - then).flatten().cpu() for now, then in pairs])
        losses = {name: journal.records[-1][name] for name in journal.records[-1] if is_loss(name)}
        return losses, update.double()

    return results


def is_loss(name):
    return name == "loss" or name in ("contrastive", "simsiam", "distillation", "mgd", "simreg")


def distance(one, other):
    """Return the relative distances between two steps' losses and between their updates."""
    pairs = [(one[0][name], value) for name, value in other[0].items() if value]
    losses = max(abs(a - b) / abs(b) for a, b in pairs)
    return losses, ((one[1] - other[1]).norm() / other[1].norm()).item()


def rounded(seed):
    """Return a function that changes each weight by one rounding, with random signs."""
    generator = torch.Generator().manual_seed(seed)

    def change(value):
        signs = torch.randint(2, value.shape, generator=generator) * 2 - 1
        return value * (1 + signs.to(value.device) * 2 * ROUNDING)

    return change


def tolerance(results, way):
    """Return the CPU's step, and the tolerances of its losses and of its update."""
    plain = results(way, "cpu")
    distances = [distance(results(way, "cpu", rounded(seed)), plain) for seed in range(SEEDS)]
    return plain, [ROOM * max(column) for column in zip(*distances, strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_step_equals_the_cpu_s_to_rounding(way, device, results, record_property):
    plain, allowed = tolerance(results, way)
    with torch.backends.mkldnn.flags(enabled=False):  # on the CPU: other kernels
        actual = distance(results(way, device), plain)
    record_property("distance", actual)
    record_property("allowed", allowed)
    assert 0 < allowed[1] < 0.1
    assert all(a <= b for a, b in zip(actual, allowed, strict=True)), (actual, allowed)


def test_tolerance_rejects_tf32(results):
    plain, allowed = tolerance(results, "moco")

    def cut(value):
        """Return the weights with a mantissa of 10 bits, as in TF32."""
        bits = value.detach().cpu().view(torch.int32)
        return (bits & ~0x1FFF).view(torch.float32).to(value.device)

    actual = distance(results("moco", "cpu", cut), plain)
    assert actual[1] > allowed[1], (actual, allowed)
