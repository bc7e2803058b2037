"""What a run's networks see: the maps of matched channels, and the features of validation images; without Horovod."""

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
from job.networks import ARCHS, DEPTH, Network, fold_norms, with_features
from job.show.read.history import History
from mgd.cost import channel_cost

IMAGES, CLASSES = (
    1000,
    10,
)  # at most, of which features are taken; more classes than ten cannot be told apart in a picture
WORK = 5e11  # floating point operations of a run's features, at most: some 10 s of a core
MATCHED = 16  # images on which matched channels are compared
SHOWN = 4  # of them in a picture
BATCH = 32
SMALLEST, LARGEST = 8, 512  # pixels, the side of an image: larger ones take too much memory
LARGEST_TEACHER = 1024  # pixels, the side to which a run resizes its teacher's images


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Images as networks see them.

    views: (n, 3, H, W) uint8. labels: (n,) int64, places in `classes`, of which -1 is "no label". root: their folder.
    """

    views: torch.Tensor
    labels: np.ndarray
    classes: list[str]
    root: str

    @property
    def remark(self) -> str:
        """A sentence for pictures of images without labels."""
        return "" if (self.labels >= 0).any() else f" The images of {self.root} have no labels."


@dataclasses.dataclass(frozen=True)
class Student:
    """A run's student at its newest checkpoint. matchings: {stage: (G, S)}; none without a teacher."""

    backbone: Backbone
    matchings: dict[int, torch.Tensor]
    options: dict
    checkpoint: str


@dataclasses.dataclass(frozen=True)
class Match:
    """A student channel and, of the G teacher channels that it is matched to, the nearest.

    rank: the student channel's place among all S by `mean`, the mean cost of its G matches. cost: of the pair, as in
    mgd/cost.py, mean over the images. correlation: over all positions of all images. student, teacher: (SHOWN, H, W),
    before the ReLU.
    """

    channels: tuple[int, int]
    rank: int
    mean: float
    cost: float
    correlation: float
    student: np.ndarray
    teacher: np.ndarray


def newest_student(history: History) -> Student:
    """Read the student of the newest checkpoint that is whole. RunError: there is none."""
    errors = []
    for path in map(str, reversed(history.checkpoints)):
        try:
            content = load(path)
            backbone = read_backbone(path, arch_flag="")
        except RunError as error:
            errors.append(str(error))
            continue
        if not isinstance(content.get("mgd"), dict):
            raise RunError(f"{path} is none of job.train")
        named = {stage: content["mgd"].get(f"matching{stage}") for stage in range(1, DEPTH + 1)}
        matchings = {
            stage: matching for stage, matching in named.items() if torch.is_tensor(matching)
        }
        return Student(
            backbone, matchings, checked(history.options | backbone.meta["config"]), path
        )
    raise RunError(errors[0] if errors else f"{history.folder} has no checkpoint yet")


def checked(options: dict) -> dict:
    """Return the options that show what a student sees. RunError: they ask for images of an unusual size."""
    size, arch = options.get("image_size"), options.get("teacher_arch")
    if not isinstance(size, int) or not SMALLEST <= size <= LARGEST:
        raise RunError(
            f"image_size {size}: expected {SMALLEST} to {LARGEST} pixels to show what a network sees"
        )
    more = options.get("more_data")
    places = [options.get("data", ""), *(more if isinstance(more, list) else [])]
    resized = options.get("teacher_size", 0)
    if not isinstance(resized, int) or (resized and not SMALLEST <= resized <= LARGEST_TEACHER):
        expected = f"expected {SMALLEST} to {LARGEST_TEACHER} pixels to show what a network sees"
        raise RunError(f"teacher_size {resized}: {expected}")
    known = isinstance(arch, str) and (arch in ARCHS or arch.startswith("timm/"))
    return {
        "image_size": size,
        "teacher_arch": arch if known else "",
        "teacher_size": resized,
        "places": [*map(str, places)],
        "teacher": str(options.get("teacher", "")),
    }


def read_teacher(student: Student, path: str) -> Network:
    """Read the teacher of a student, of a hub from the cache only.

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
    """The network of a backbone, to be used as it is."""
    net = backbone.build(image_size)
    net.eval().requires_grad_(False)
    return fold_norms(net).to(memory_format=torch.channels_last)


@contextlib.contextmanager
def folder_of(data: str) -> Iterator[str]:
    """The folder of --data, of the digits one that lasts as long as the context where they are not written yet."""
    if data != "digits" or os.path.isdir(digits.FOLDER):
        yield digits.prepared(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        digits.write_digits(f"{folder}/digits")
        yield f"{folder}/digits"


@functools.cache
def read_sample(places: tuple[str, ...], size: int) -> Sample:
    """Read centre crops of images, the same ones each time. RunError: there are none.

    places: folders and lists, or the word digits. The images are the validation images of those
    that have some; if none has, the training images of all.
    """
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(folder_of(place)) for place in places]
        held_out = [folder for folder in folders if split_of(folder, VALIDATION)]
        images = scan(held_out or folders, *VALIDATION, "train")
        views = CentreViews(images, size)
        prepare_process()
        read = [
            (view, label) for view, label, bad in map(views.__getitem__, choose(images)) if not bad
        ]
    if len(read) < 2:
        raise RunError(f"{images.root} has fewer than two images that can be decoded")
    root = images.root
    for place, folder in zip(places, folders, strict=True):
        root = root.replace(folder, place)  # the digits may lie in a folder of a moment
    classes = [*images.classes, "no label"]
    return Sample(
        torch.stack([view for view, _ in read]),
        np.array([label for _, label in read]),
        classes,
        root,
    )


def choose(images: Images) -> list[int]:
    """At most IMAGES images of at most CLASSES classes, in a random order that is the same each time."""
    random = np.random.default_rng(0)
    present = np.unique(images.labels)
    classes = random.permutation(present)[:CLASSES]
    return random.permutation(np.flatnonzero(np.isin(images.labels, classes)))[:IMAGES].tolist()


@torch.no_grad()
def embed(net: Network, sample: Sample) -> torch.Tensor:
    """L2-normalised features (m, C) under the head of the first m images of a sample: as many as WORK allows."""
    encoder = with_features(net, [], output="flatten")
    with FlopCounterMode(display=False) as counter:
        encoder(normalize(sample.views[:1]))
    m = max(2 * BATCH, int(WORK / max(1, counter.get_total_flops())))
    features = [encoder(normalize(views))["flatten"] for views in sample.views[:m].split(BATCH)]
    return F.normalize(torch.cat(features), dim=1)


def nearest(features: torch.Tensor, queries: list[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each query among features (m, C): places and cosines, (queries, k) each, nearest first."""
    cosines = features[queries] @ features.T
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    found = cosines.topk(min(k, len(features) - 1), dim=1)
    return found.indices.numpy(), found.values.numpy()


def fits(matching: torch.Tensor, S: int, T: int) -> bool:
    """Whether this matches each of S student channels with channels among T of a teacher, none of them twice."""
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
    """Of each distilled stage the three cheapest channels and the one in the middle, on views (n, 3, H, W) uint8.

    RunError: the teacher has not the channels that the matching names.
    """
    stages = sorted(student.matchings)
    inputs = normalize(views)
    own = network(student.backbone, inputs.shape[2])
    ours, theirs = (with_features(net, stages, output=None)(inputs) for net in (own, teacher))
    found: dict[int, list[Match]] = {}
    for stage in stages:
        s, t, matching = (
            ours[f"layer{stage}"],
            theirs[f"layer{stage}"],
            student.matchings[stage],
        )  # (n, S, H, W), (n, T, H, W)
        if not fits(matching, s.shape[1], t.shape[1]) or s.shape[2:] != t.shape[2:]:
            raise RunError(
                f"the teacher's stage {stage} has not the channels that the run matched: name its file with --teacher"
            )
        costs = channel_cost(s, t)[torch.arange(s.shape[1]), matching] / len(views)  # (G, S)
        means, (best, group) = costs.mean(0), costs.min(0)
        order = means.argsort().tolist()
        found[stage] = []
        for place in dict.fromkeys([0, 1, 2, len(order) // 2]):
            a = order[place]
            b = int(matching[group[a], a])
            correlation = (
                torch.corrcoef(torch.stack([s[:, a].flatten(), t[:, b].flatten()]))[0, 1]
                .nan_to_num()
                .item()
            )
            maps = s[:SHOWN, a].numpy(), t[:SHOWN, b].numpy()
            found[stage].append(
                Match((a, b), place, means[a].item(), best[a].item(), correlation, *maps)
            )
    return found
