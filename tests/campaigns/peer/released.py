"""Compare job.train with SimSiam's released program: same weights, same images.

    git clone https://github.com/facebookresearch/simsiam CLONE
    python tests/campaigns/peer/released.py CLONE [-a resnet18] [--image-size 64] [--batch-size 32]

Both train for ten epochs of one step with the preset `simsiam` on scikit-learn's digits, on the
CPU. The command runs with 1 and 2 workers. The released network, training loop and schedule are
imported from CLONE. They get the command's first weights and its views in one process, in float32
and in float64. The table has each run's distance from the released program in float64, the largest
of all steps so far: of the loss, and of parameters and running statistics relative to their change
since the start.

- "control": the released program whose predictor's rate falls too
- "channels last": the released program on views and parameters of our layout, where the CPU's batch
  norms round more coarsely
- last line: the distance of the command with 1 worker from "channels last"

Rounding switches ReLUs, which later steps amplify, so the default rate is low. If, after any step,
the command is more than FACTOR times as far as "channels last", the exit code is 1.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torchvision import models

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO))

from job.build import build  # noqa: E402
from job.config import Config, read_config  # noqa: E402
from job.data.augment import normalize  # noqa: E402
from job.data.digits import write_digits  # noqa: E402
from job.engine.run import Run  # noqa: E402
from job.position import START  # noqa: E402

STEPS, FACTOR = 10, 4
LINE = "{:<26}{:>5}{:>12}{:>12}{:>12}"
State = dict[str, torch.Tensor]
Course = tuple[list[float], list[State]]  # the loss of each step, and the state after it


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("clone", metavar="CLONE", type=Path)
    parser.add_argument("-a", "--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.001)
    given = parser.parse_args()
    program = released(given.clone)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link_images(folder, given.batch_size)
        options = [str(folder / "few"), "--config", "simsiam", "--seed", "1", "--workers", "0"]
        options += ["--epochs", str(STEPS), "--keep", str(STEPS), "--arch", given.arch]
        options += ["--image-size", str(given.image_size), "--batch-size", str(given.batch_size)]
        options += ["--lr", str(given.lr)]
        config = read_config(options)
        start, batches = first_weights_and_views(config, folder)
        exact = follow(program, config, start, batches, torch.float64)
        courses = {"released": follow(program, config, start, batches, torch.float32)}
        layout = torch.channels_last  # of job.train's views and parameters
        courses["channels last"] = follow(program, config, start, batches, torch.float32, layout)
        courses["control"] = follow(program, config, start, batches, torch.float64, constant=False)
        courses |= {f"{N} worker(s)": train(options, N, folder / f"out{N}") for N in (1, 2)}
    print(LINE.format("distance from float64", "step", "loss", "parameters", "statistics"))
    apart = {name: distances(course, exact, start) for name, course in courses.items()}
    for name, rows in apart.items():
        for step, row in enumerate(rows, 1):
            print(LINE.format(name, step, *(f"{value:.1e}" for value in row)))
    row = distances(courses["1 worker(s)"], courses["channels last"], start)[-1]
    print(LINE.format("1 worker, channels last", STEPS, *(f"{value:.1e}" for value in row)))
    ours = [name for name in apart if name.endswith("(s)")]
    far = [name for name in ours if further(apart[name], apart["channels last"])]
    if far:
        sys.exit(f"{', '.join(far)}: more than {FACTOR} times as far as the released program")


def released(clone: Path) -> ModuleType:
    """Return the released main program. Exits with 2 if CLONE does not have it."""
    if not (clone / "main_simsiam.py").is_file() or not (clone / "simsiam/builder.py").is_file():
        missing = "no main_simsiam.py and simsiam/builder.py"
        expected = "a clone of https://github.com/facebookresearch/simsiam"
        print(f"CLONE {clone}: {missing}; expected {expected}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(clone))
    return importlib.import_module("main_simsiam")


def link_images(folder: Path, count: int) -> None:
    """Write the digits, and link the first `count` of all classes to folder/few/train."""
    write_digits(str(folder / "digits"))
    (folder / "few/train/all").mkdir(parents=True)
    images = sorted((folder / "digits/train").rglob("*.png"), key=lambda path: path.name)
    for path in images[:count]:
        (folder / "few/train/all" / path.name).symlink_to(path)


def first_weights_and_views(config: Config, folder: Path) -> tuple[State, list]:
    """Return the state at the start, and each step's normalised views, 2 x (B, 3, H, W)."""
    with Run(str(folder / "unused"), 1) as run:
        training = build(config, run)
        views = [views for views, *_ in itertools.islice(training.batches(START), STEPS)]
        state = copied(training.framework.module)
    return state, [[normalize(view).contiguous() for view in pair] for pair in views]


def copied(net: nn.Module) -> State:
    """Return a copy of a network's state."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def follow(
    program: ModuleType,
    config: Config,
    start: State,
    batches: list,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    constant: bool = True,
) -> Course:
    """Train the released network by the released functions.

    constant: the predictor's rate does not fall.
    """
    net = program.simsiam.builder.SimSiam(models.__dict__[config.arch], config.dim, config.pred_dim)
    net.load_state_dict(start)
    net.to(dtype=dtype, memory_format=layout)
    criterion, cosines = nn.CosineSimilarity(dim=1), []  # two cosines a step
    criterion.register_forward_hook(lambda *call: cosines.append(call[-1].mean().item()))
    groups = [{"params": net.encoder.parameters()}]
    groups += [{"params": net.predictor.parameters(), "fix_lr": constant}]
    sgd = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay)
    options = argparse.Namespace(epochs=STEPS, gpu=None, print_freq=1)
    states = []
    for epoch, views in enumerate(batches):
        program.adjust_learning_rate(sgd, config.lr, epoch, options)
        step = [([view.to(dtype, memory_format=layout) for view in views], None)]
        with contextlib.redirect_stdout(io.StringIO()):
            program.train(step, net, criterion, sgd, epoch, options)
        states.append(copied(net))
    losses = [-(one + other) / 2 for one, other in zip(cosines[::2], cosines[1::2], strict=True)]
    return losses, states


def train(options: list[str], workers: int, out: Path) -> Course:
    """Train by the command."""
    launcher = [Path(sys.executable).with_name("horovodrun"), "-np", str(workers), sys.executable]
    command = [*launcher, "-m", "job.train", *options, "--out", out]
    subprocess.run([*map(str, command)], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [record["cosine"] for record in records if record["kind"] == "step"]
    paths = sorted(out.glob("checkpoint_*.pth.tar"))
    assert len(losses) == len(paths) == STEPS
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    prefix = len("module.")
    return losses, [{name[prefix:]: value for name, value in state.items()} for state in states]


def distances(course: Course, exact: Course, start: State) -> list[list[float]]:
    """Return the largest distances so far after each step: loss, parameters, statistics."""
    tensors = [name for name, value in start.items() if value.is_floating_point()]
    statistics = [name for name in tensors if "running" in name]
    groups = [name for name in tensors if name not in statistics], statistics
    rows: list[list[float]] = []
    for loss, state, true_loss, true_state in zip(*course, *exact, strict=True):
        off = [distance(state, true_state, group) for group in groups]
        moved = [distance(true_state, start, group) for group in groups]
        row = [abs(loss - true_loss), *(a / b for a, b in zip(off, moved, strict=True))]
        rows.append([max(each) for each in zip(row, *rows[-1:], strict=True)])
    return rows


def further(rows: list[list[float]], limits: list[list[float]]) -> bool:
    """Return whether a distance after any step exceeds FACTOR times its limit."""
    pairs = zip(itertools.chain(*rows), itertools.chain(*limits), strict=True)
    return any(not value <= FACTOR * limit for value, limit in pairs)


def distance(one: State, other: State, names: list[str]) -> float:
    """Return the Euclidean distance of two states' named tensors."""
    apart = (one[name].double() - other[name].double() for name in names)
    return sum(value.square().sum().item() for value in apart) ** 0.5


if __name__ == "__main__":
    main()
