"""Features of a run's networks: maps of matched channels, and features of validation images.

It needs no Horovod.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from job.checkpoints.folder import load
from job.checkpoints.foreign import Backbone, read_backbone
from job.data import digits
from job.data.augment import normalize
from job.data.folders import VALIDATION, scan, split_of
from job.data.images import Images, prepare_process
from job.data.views import CentreViews
from job.errors import RunError
from job.networks import ARCHS, DEPTH, Network, fold_norms, to_channels_last, with_features
from job.show.read.history import History
from mgd.cost import channel_cost

IMAGES, CLASSES = 1000, 10  # most of a sample; more classes are not distinguishable in a picture
WORK = 5e11  # most floating point operations for a run's features: about 10 s of a core
MATCHED = 16  # images for the comparison of matched channels
SHOWN = 4  # of them in a picture
BATCH = 32
SMALLEST, LARGEST = 8, 512  # pixels, side of an image; larger ones need too much memory
LARGEST_TEACHER = 1024  # pixels, side of a teacher's resized image


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Images as networks see them.

    views: (n, 3, H, W) uint8. labels: (n,) int64, indices of `classes`; -1 is "no label", the last.
    root: their folder.
    """

    views: torch.Tensor
    labels: np.ndarray
    classes: list[str]
    root: str

    @property
    def remark(self) -> str:
        """A sentence for pictures of unlabelled images, or ""."""
        return "" if (self.labels >= 0).any() else f" The images of {self.root} have no labels."


@dataclasses.dataclass(frozen=True)
class Student:
    """A run's student at its newest checkpoint.

    matchings: {stage: (G, S) int64}, {} without a teacher.
    """

    backbone: Backbone
    matchings: dict[int, torch.Tensor]
    options: dict
    checkpoint: str


@dataclasses.dataclass(frozen=True)
class Match:
    """A student channel and the nearest of its G matched teacher channels.

    rank: the student channel's rank among all S by `mean`, the mean cost of its G matches, from 0.
    cost: of the pair, as in mgd/cost.py, mean over the images.
    correlation: over all positions of all images.
    student, teacher: (SHOWN, H, W), before the ReLU.
    """

    channels: tuple[int, int]
    rank: int
    mean: float
    cost: float
    correlation: float
    student: np.ndarray
    teacher: np.ndarray


def newest_student(history: History) -> Student:
    """Read the student of the newest readable checkpoint. RunError: no checkpoint is readable."""
    errors = []
    for path in map(str, reversed(history.checkpoints)):
        try:
            content = load(path)
            backbone = read_backbone(path, arch_flag="")
        except RunError as error:
            errors.append(str(error))
            continue
        if not isinstance(content.get("mgd"), dict):
            raise RunError(f"{path}: not a checkpoint of job.train")
        saved = {stage: content["mgd"].get(f"matching{stage}") for stage in range(1, DEPTH + 1)}
        matchings = {
            stage: matching for stage, matching in saved.items() if torch.is_tensor(matching)
        }
        return Student(
            backbone, matchings, checked(history.options | backbone.meta["config"]), path
        )
    raise RunError(errors[0] if errors else f"{history.folder} has no checkpoint yet")


def checked(options: dict) -> dict:
    """Return the options for a student's features. RunError: an image size is out of range."""
    size, arch = options.get("image_size"), options.get("teacher_arch")
    if not isinstance(size, int) or not SMALLEST <= size <= LARGEST:
        raise RunError(
            f"image_size {size}: expected {SMALLEST} to {LARGEST} pixels for pictures of features"
        )
    more = options.get("more_data")
    data = [options.get("data", ""), *(more if isinstance(more, list) else [])]
    resized = options.get("teacher_size", 0)
    if not isinstance(resized, int) or (resized and not SMALLEST <= resized <= LARGEST_TEACHER):
        expected = f"expected {SMALLEST} to {LARGEST_TEACHER} pixels for pictures of features"
        raise RunError(f"teacher_size {resized}: {expected}")
    known = isinstance(arch, str) and (arch in ARCHS or arch.startswith("timm/"))
    return {
        "image_size": size,
        "teacher_arch": arch if known else "",
        "teacher_size": resized,
        "data": [*map(str, data)],
        "teacher": str(options.get("teacher", "")),
    }


def read_teacher(student: Student, path: str) -> Network:
    """Read a student's teacher. A file from a hub is read from the cache only.

    RunError: the file cannot be read, or its network cannot be this student's teacher.
    """
    arch, size = student.options["teacher_arch"], student.options["teacher_size"]
    backbone = read_backbone(path, arch, arch_flag="", download=False, size=size)
    if backbone.is_resnet and student.backbone.is_resnet and backbone.stem != student.backbone.stem:
        raise RunError(
            f"{path} has the {backbone.stem} stem, the student the {student.backbone.stem} one"
        )
    return network(backbone, student.options["image_size"])


def network(backbone: Backbone, image_size: int) -> Network:
    """Return a backbone's network for inference."""
    net = fold_norms(backbone.build(image_size)).requires_grad_(False)
    to_channels_last(net)
    return net


@contextlib.contextmanager
def folder_of(data: str) -> Iterator[str]:
    """Yield the folder of --data. If the digits are not written yet, use a temporary folder."""
    if data != "digits" or os.path.isdir(digits.FOLDER):
        yield digits.prepared(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        digits.write_digits(f"{folder}/digits")
        yield f"{folder}/digits"


@functools.cache
def read_sample(data: tuple[str, ...], size: int) -> Sample:
    """Read centre crops of images, always the same ones. RunError: too few are readable.

    data: values of --data: folders, lists, or the word digits. The images are the validation images
    of those that have some, or the training images of all if none has.
    """
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(folder_of(path)) for path in data]
        held_out = [folder for folder in folders if split_of(folder, VALIDATION)]
        images = scan(held_out or folders, *VALIDATION, "train")
        views = CentreViews(images, size)
        prepare_process()
        decoded = [
            (view, label) for view, label, bad in map(views.__getitem__, choose(images)) if not bad
        ]
    if len(decoded) < 2:
        raise RunError(f"{images.root}: expected at least two decodable images")
    root = images.root
    for path, folder in zip(data, folders, strict=True):
        root = root.replace(folder, path)  # the folder of the digits may be temporary
    classes = [*images.classes, "no label"]
    return Sample(
        torch.stack([view for view, _ in decoded]),
        np.array([label for _, label in decoded]),
        classes,
        root,
    )


def choose(images: Images) -> list[int]:
    """Return indices of at most IMAGES images of CLASSES classes, in a fixed random order."""
    random = np.random.default_rng(0)
    present = np.unique(images.labels)
    classes = random.permutation(present)[:CLASSES]
    return random.permutation(np.flatnonzero(np.isin(images.labels, classes)))[:IMAGES].tolist()


@torch.no_grad()
def embed(net: Network, sample: Sample) -> torch.Tensor:
    """Return L2-normalised features below the head, (m, C) float32, of the first m images.

    m is as large as WORK allows.
    """
    encoder = with_features(net, [], output="flatten")
    with FlopCounterMode(display=False) as counter:
        encoder(normalize(sample.views[:1]))
    m = max(2 * BATCH, int(WORK / max(1, counter.get_total_flops())))
    features = [encoder(normalize(views))["flatten"] for views in sample.views[:m].split(BATCH)]
    return F.normalize(torch.cat(features), dim=1)


def nearest(features: torch.Tensor, queries: list[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest other images of n queries among features (m, C), nearest first.

    The results are indices, (n, k) int64, and cosines, (n, k).
    """
    cosines = features[queries] @ features.T  # (n, m)
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    best = cosines.topk(min(k, len(features) - 1), dim=1)
    return best.indices.numpy(), best.values.numpy()


def fits(matching: torch.Tensor, S: int, T: int) -> bool:
    """Return whether a matching is int64 (G, S), with G * S <= T and indices below T.

    It does not check that the indices are distinct.
    """
    if (
        matching.dtype != torch.int64
        or matching.dim() != 2
        or matching.shape[1] != S
        or matching.numel() > T
    ):
        return False
    return bool(matching.numel() and matching.min() >= 0 and matching.max() < T)


@torch.no_grad()
def matches(student: Student, teacher: Network, views: torch.Tensor) -> dict[int, list[Match]]:
    """Return {stage: matches}, the three cheapest student channels and the median one.

    views: (n, 3, H, W) uint8. RunError: the teacher does not have the channels of the matching.
    """
    stages = sorted(student.matchings)
    inputs = normalize(views)
    networks = network(student.backbone, inputs.shape[2]), teacher
    of_student, of_teacher = (with_features(net, stages, output=None)(inputs) for net in networks)
    matched: dict[int, list[Match]] = {}
    for stage in stages:
        s = of_student[f"layer{stage}"]  # (n, S, H, W)
        t = of_teacher[f"layer{stage}"]  # (n, T, H, W)
        matching = student.matchings[stage]  # (G, S)
        if not fits(matching, s.shape[1], t.shape[1]) or s.shape[2:] != t.shape[2:]:
            raise RunError(f"the teacher's stage {stage} does not fit the run's matching")
        costs = channel_cost(s, t)[torch.arange(s.shape[1]), matching] / len(views)  # (G, S)
        means, (best, group) = costs.mean(0), costs.min(0)
        order = means.argsort().tolist()
        matched[stage] = []
        for rank in dict.fromkeys([0, 1, 2, len(order) // 2]):
            a = order[rank]
            b = int(matching[group[a], a])
            correlation = (
                torch.corrcoef(torch.stack([s[:, a].flatten(), t[:, b].flatten()]))[0, 1]
                .nan_to_num()
                .item()
            )
            maps = s[:SHOWN, a].numpy(), t[:SHOWN, b].numpy()
            matched[stage].append(
                Match((a, b), rank, means[a].item(), best[a].item(), correlation, *maps)
            )
    return matched
