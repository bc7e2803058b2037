"""Build a training run from its options: images, framework, distillers, optimizer."""

import importlib.util
import os
import shutil

import torch
from torch import nn

from job.cluster import comm, objects, task
from job.config import Config, without_head
from job.data import digits, randomness
from job.data.folders import scan, scan_validation
from job.data.images import Images
from job.distill import DISTILLERS, Distiller
from job.distill.base import Networks
from job.distill.distillation import Distillation
from job.distill.feature_teacher import load_features
from job.distill.fit import check_fit
from job.distill.momentum import MOMENTUM
from job.distill.options import is_feature_file
from job.distill.teacher import load_teacher
from job.engine.gradients import Gradients
from job.engine.run import Run
from job.errors import RunError
from job.frameworks import FRAMEWORKS, Framework
from job.metrics import schema
from job.metrics.log import Log
from job.networks import ARCHS, DEPTH, HEAD, network_outline, to_channels_last
from job.text import plural
from job.training import CHECKPOINT, Training

# Names that the loop gives to a step's numbers, in their sums over the workers or in their record.
STEP = {*schema.Step.__annotations__, "kind", "distillation", "gradient", "gradient_norm"}
STEP |= {"stop", "undecodable"}
DISTILLING = "distillers"  # the module of all distillers, next to the framework's


def build(config: Config, run: Run) -> Training:
    """Build the parts of a run, with initial weights by the seed.

    A collective. RunError: the data, the networks or the teacher do not fit the options.
    """
    if config.framework == "none" and not config.teacher:
        raise RunError(
            "--framework none: expected a --teacher, as nothing else trains the student. "
            "Add --teacher, or choose another framework"
        )
    if config.arch not in ARCHS:  # the code of a user's network, or timm, may differ between nodes
        stem, width, size = config.stem, config.width, config.image_size
        run.build(config.arch, lambda: network_outline(config.arch, stem, width, size))
    images = find_images(config, run)
    val = None
    if config.knn_every:
        data = digits.all_prepared
        val = run.on_first(lambda: scan_validation(data(config.images_from), images))
    for found in filter(None, (images, val)):
        for line in found.lines:
            run.log.line(line)
    torch.manual_seed(randomness.torch_seed(config.seed, "weights"))
    kinds = [DISTILLERS[name] for name in config.distill] if config.teacher else []
    # Without distilled stages, the last one shows signs of collapse.
    stages = sorted({stage for kind in kinds for stage in kind.stages(config)} or {DEPTH})
    framework = FRAMEWORKS[config.framework](config, stages)
    check_names(framework, kinds)
    framework.distil(max((kind.views for kind in kinds), default=1))
    distillation = Distillation(config, None, [])
    if config.teacher:
        distillation = build_distillation(config, run, images, framework, kinds, stages)
    compiled = framework.networks()
    if distillation.networks:
        compiled = [*compiled, distillation.networks.teacher.net]
    if distillation.momentum:
        compiled = [*compiled, distillation.momentum.module]
    distilling = nn.ModuleDict(distillation.modules())
    trained = nn.ModuleDict({framework.name: framework.module, DISTILLING: distilling})
    trained.to(run.device).train()
    comm.broadcast_(trained.state_dict())
    to_channels_last(trained)  # not before the broadcast, which needs contiguous tensors
    check_layouts(config.arch, trained)

    if config.compile:
        compile_networks(run, *compiled)
    parameters = [
        (name, value) for name, value in trained.named_parameters() if value.requires_grad
    ]
    groups = parameter_groups([value for _, value in parameters], framework.constant_rate())
    decay = config.weight_decay
    sgd = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=decay, fused=True)
    gradients = Gradients(parameters, config.accumulate, config.fp16_allreduce)
    return Training(config, run, images, val, framework, distillation, trained, gradients, sgd)


def build_distillation(
    config: Config,
    run: Run,
    images: Images,
    framework: Framework,
    kinds: list[type[Distiller]],
    stages: list[int],
) -> Distillation:
    """Load the teacher, and build distillers of the given kinds and stages. A collective.

    RunError, on all workers: the teacher cannot be used, or does not fit the student.
    """
    if is_feature_file(config.teacher):
        teacher = load_features(config, kinds, images, run)
    else:
        needs_head = any(kind.needs_head(config) for kind in kinds)
        teacher = load_teacher(config, stages, needs_head, run)
    warn_of_head_width(config, (framework.head_dim, teacher.head_dim), run.log)
    student = network_outline(config.arch, config.stem, config.width, config.image_size)
    check_fit(config, kinds, DISTILLERS, student, teacher)
    widths = {**student.widths, HEAD: framework.head_dim}
    distillers = [kind(config, widths, teacher) for kind in kinds]
    return Distillation(config, Networks(run, images, framework, teacher), distillers)


def warn_of_head_width(config: Config, dims: tuple[int, int], log: Log) -> None:
    """Warn if --head-width has no effect because the student's head fits the teacher's.

    dims: outputs of the framework's head and of the teacher's, which the options do not show.
    This is not an error: a file may serve several runs, and a resumed run needs its first value.
    """
    if config.head_width and not without_head(config):
        if unused := without_head(config, dims):
            text = f"--head-width {config.head_width}: no effect {unused['head_width']}"
            log.remark("warning", "unused_head_width", f"{text}, in a new run")


def check_names(framework: Framework, kinds: list[type[Distiller]]) -> None:
    """RunError: a name, loss or metric occurs twice in a step's numbers or a checkpoint."""
    distillers = [kind.name for kind in kinds]
    shown = f"--framework {framework.name}"
    shown += f" --distill {' '.join(distillers)}" if distillers else ""
    names_by_use = {
        "numbers of a step": [*STEP, *distillers, *framework.losses, *framework.metrics],
        "parts of a checkpoint": [*CHECKPOINT, MOMENTUM, *distillers],
        "trained modules": [DISTILLING, framework.name],
    }
    for use, names in names_by_use.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RunError(
                f"{shown}: two {use} have the name {twice[0]!r}; expected different names. "
                "Rename one in job/frameworks or job/distill"
            )


def parameter_groups(parameters: list[nn.Parameter], constant: list[nn.Parameter]) -> list[dict]:
    """Return an optimizer's parameter groups.

    The second, if any, has the parameters of a `constant` rate. It has `fix_lr`, as in SimSiam's
    released checkpoints.
    """
    apart = set(map(id, constant))
    groups: list[dict] = [{"params": [value for value in parameters if id(value) not in apart]}]
    return groups + [{"params": constant, "fix_lr": True}] * bool(constant)


def check_layouts(arch: str, trained: nn.Module) -> None:
    """Check that the parameters' layouts are the same on all workers. A collective.

    Otherwise sums of gradients would mix values. Each worker tries whether the network supports
    channels last. RunError, on all workers: a layout differs.
    """
    own = [value.stride() for value in trained.parameters()]
    workers = objects.allgather((task.node(), own), "layouts")
    if different := [node for node, strides in workers if strides != workers[0][1]]:
        raise RunError(
            f"--arch {arch}: its weights have another layout on {different[0]} than on "
            f"{workers[0][0]}; expected the same. Use the same code and the same CPUs on all nodes"
        )


def compile_networks(run: Run, *networks: nn.Module) -> None:
    """Compile networks in place, when they are first used.

    A collective. RunError, on all workers: one lacks a compiler.
    """
    needed: dict[str, object] = {"a C++ compiler": shutil.which(os.environ.get("CXX", "g++"))}
    if torch.cuda.is_available():
        needed["triton"] = importlib.util.find_spec("triton")
    missing = [name for name, found in needed.items() if not found]
    if run.total(missing=len(missing))["missing"]:
        lacking = " and ".join(missing) or "a compiler on each node"
        raise RunError(
            f"--compile: missing; expected {lacking}. Install it, or leave out --compile"
        )
    for network in networks:
        network.compile()


def find_images(config: Config, run: Run) -> Images:
    """Return the training images that rank 0 lists.

    A collective. RunError: too few images for a step, or a batch that the workers cannot divide.
    """
    total, parts = config.batch_size, config.accumulate
    own = run.own_batch(total)
    if own % parts:
        raise RunError(
            f"--accumulate {parts}: cannot divide a worker's batch of {own} images; "
            "expected a divisor of it"
        )
    if own < 2 * parts:
        raise RunError(
            f"--batch-size {total}: one image for each of {run.size * parts} micro-batches, and "
            f"batch norm needs two; expected {2 * run.size * parts} or more"
        )
    data, bad = digits.all_prepared, config.max_bad_images
    images = run.on_first(lambda: scan(data(config.images_from), "train", max_bad=bad))
    if len(images) < total:
        raise RunError(
            f"--batch-size {total}: {images.root} has only {plural(len(images), 'image')}; "
            f"expected at most {len(images)}. Choose a smaller batch, or add images"
        )
    return images
