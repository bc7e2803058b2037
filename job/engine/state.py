"""All that a training run is made of, built from its options: images, networks, distiller, optimizer."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import ResNet

from job.checkpoints.foreign import read_backbone
from job.cluster import comm
from job.config import Config
from job.data import digits, randomness
from job.data.augment import RandomView
from job.data.folders import TrainingOrder, scan, scan_validation
from job.data.images import Images
from job.data.render_batch import render
from job.data.views import TwoViews
from job.engine import replicas
from job.engine.gradients import Gradients
from job.engine.run import Run
from job.errors import RunError
from mgd.distiller import MGDistiller
from moco.encoder import DEPTH, build_resnet, fold_norms, stage_norms, with_features
from moco.model import MoCo


@dataclass
class Training:
    """A training run's parts. `teacher` and `distiller` are None in plain MoCo."""

    config: Config
    run: Run
    images: Images
    val: Images | None  # for --knn-every
    moco: MoCo
    teacher: nn.Module | None
    teacher_digest: str  # of the weights in --teacher; "" without one
    distiller: MGDistiller | None
    trained: nn.ModuleDict  # moco and distiller: all that changes, is saved and is restored
    gradients: Gradients
    optimizer: torch.optim.Optimizer

    def student(self) -> ResNet:
        """A copy of the student as it is, with a head of its own that means nothing."""
        net = build_resnet(self.config.arch, stem=self.config.stem, width=self.config.width)
        body = {name: value for name, value in self.moco.encoder_q.state_dict().items() if not name.startswith("fc.")}
        net.load_state_dict(body, strict=False)
        return net.to(self.run.device)

    def common(self) -> dict[str, torch.Tensor]:
        """All that is the same on every worker, by name. The teacher too: one that is wrong gives gradients that all share."""
        teacher = self.teacher.state_dict() if self.teacher else {}
        return replicas.shared(self.trained, self.optimizer) | {f"teacher.{name}": value for name, value in teacher.items()}

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.images) // self.config.batch_size

    def order(self, epoch: int) -> str:
        """A word for the images of an epoch, in their order."""
        return self.images.digest(self.config.seed, epoch, self.config.batch_size)

    def batches(self, start: tuple[int, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        """An iterator over this worker's steps from (epoch, step) `start` on.

        Each is the query and the key view of its images, (B, 3, H, W) uint8 on its device, and undecodable files.
        """
        config, run = self.config, self.run
        order = TrainingOrder(self.images, config.batch_size, run.rank, run.size, config.seed, config.epochs, start)
        view = RandomView(config.image_size, config.aug_plus, config.crop_min)
        views = TwoViews(self.images, view, config.seed, rendered=config.augment_on == "cpu")
        return map(self.arrived, run.batches(views, order, config.workers))

    def arrived(self, batch: tuple) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """A loader's batch, on the device and rendered."""
        *views, undecodable = batch
        if self.config.augment_on == "cpu":
            query, key = (view.to(self.run.device, non_blocking=True) for view in views)
        else:
            query, key = (render(crop.to(self.run.device, non_blocking=True), appearance) for crop, appearance in views)
        return query, key, undecodable


def build(config: Config, run: Run) -> Training:
    """Build a run's parts; the networks' first weights follow from the seed. RunError: data or teacher that does not fit."""
    images = find_images(config, run)
    val = run.on_first(lambda: scan_validation(digits.prepared(config.data), images)) if config.knn_every else None
    for found in filter(None, (images, val)):
        if found.left_out:
            run.log.line(found.left_out)
    torch.manual_seed(randomness.torch_seed(config.seed, "weights"))
    stages = config.mgd_stages if config.teacher else [DEPTH]  # there for job/metrics/collapse.py alone
    first = {"stem": config.stem, "width": config.width, "zero_init_residual": config.zero_init_residual}
    moco = MoCo(comm, config.arch, config.moco_dim, config.moco_k, config.moco_m, config.moco_t, config.mlp, stages, **first)
    teacher, distiller, digest = None, None, ""
    if config.teacher:
        teacher, distiller, digest = build_teacher(config, run, stage_norms(moco.encoder_k))
    trained = nn.ModuleDict({"moco": moco} | ({"mgd": distiller} if distiller else {})).to(run.device).train()
    comm.broadcast_(trained.state_dict())

    if config.compile:
        compile_networks(run, moco.encoder_q, moco.encoder_k, *([teacher] if teacher else []))
    parameters = [(name, value) for name, value in trained.named_parameters() if value.requires_grad]
    sgd = torch.optim.SGD(
        [value for _, value in parameters], config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    gradients = Gradients(parameters, config.accumulate, config.fp16_allreduce)
    return Training(config, run, images, val, moco, teacher, digest, distiller, trained, gradients, sgd)


def compile_networks(run: Run, *networks: nn.Module) -> None:
    """Let networks be compiled when they are first used, in place. RunError, on all workers: one lacks what that needs."""
    needed: dict[str, object] = {"a C++ compiler": shutil.which(os.environ.get("CXX", "g++"))}
    if torch.cuda.is_available():
        needed["triton"] = importlib.util.find_spec("triton")
    missing = [name for name, found in needed.items() if not found]
    if run.total(missing=len(missing))["missing"]:
        lacking = " and ".join(missing) or "what another node lacks"
        raise RunError(f"--compile needs {lacking}: install what is missing, or leave --compile out")
    for network in networks:
        network.compile()


def find_images(config: Config, run: Run) -> Images:
    """Return the training images, as rank 0 finds them. RunError: too few for a step, or a batch that cannot be shared."""
    total, parts = config.batch_size, config.accumulate
    if run.share(total) % parts:
        raise RunError(
            f"--accumulate {parts}: a worker's {run.share(total)} images have no {parts} equal parts; choose a divisor"
        )
    if run.share(total) < 2 * parts:
        raise RunError(
            f"--batch-size {total} over {run.size} workers{f' in {parts} parts each' if parts > 1 else ''} is one image each, "
            f"and batch norm needs two: choose {2 * run.size * parts} or more"
        )
    images = run.on_first(lambda: scan(digits.prepared(config.data), "train", max_bad=config.max_bad_images))
    if len(images) < total:
        raise RunError(f"{images.root} has {len(images)} images, fewer than --batch-size {total}: choose a smaller batch")
    return images


def build_teacher(config: Config, run: Run, student: dict[int, nn.BatchNorm2d]) -> tuple[nn.Module, MGDistiller, str]:
    """Return the frozen teacher, images -> {"layerN": features}, the distiller to the student's stages, and the weights' digest.

    RunError: the file cannot be used, or its network has another stem, or fewer channels than the student.
    """
    weights = run.on_first(lambda: read_backbone(config.teacher, config.teacher_arch))
    if weights.stem != config.stem:
        raise RunError(
            f"{config.teacher} has the {weights.stem} stem, the student the {config.stem} one: choose --stem {weights.stem}"
        )
    net = build_resnet(weights.arch, stem=weights.stem, width=weights.width)
    net.load_state_dict(weights.state, strict=False)  # what is missing is the head alone: read_backbone has checked the rest
    run.log.line(f"teacher {weights.report}")
    norms = stage_norms(net)
    channels = {stage: (student[stage].num_features, norms[stage].num_features) for stage in config.mgd_stages}
    try:
        chosen = dict(zip(config.mgd_stages, config.stage_weights, strict=False))  # of as many weights, or none
        distiller = MGDistiller(channels, config.reducer, config.loss_factor, DEPTH, chosen)
    except ValueError as error:
        raise RunError(
            f"--teacher {config.teacher} ({weights.arch}, width {weights.width}) for -a {config.arch}, width {config.width}: "
            f"{error}"
        ) from None
    if config.margins == "loaded":
        distiller.load_margins(norms)
    if config.matching == "random":
        draw_matchings(distiller, config.seed)
    teacher = with_features(fold_norms(net), config.mgd_stages, output=None).eval().requires_grad_(False)
    comm.broadcast_(teacher.state_dict())  # folding may round otherwise on another kind of processor
    return teacher.to(run.device).to(memory_format=torch.channels_last), distiller, weights.digest


def draw_matchings(distiller: MGDistiller, seed: int) -> None:
    """Match each student channel to teacher channels at random, none twice: the first G x S of a permutation of all T."""
    for stage in distiller.stages:
        matching = distiller.matching(stage)  # (G, S)
        drawn = randomness.permutation(len(distiller.margin(stage)), seed, "matching", sample=stage)  # (T,)
        matching.copy_(torch.from_numpy(drawn[: matching.numel()]).view_as(matching))
