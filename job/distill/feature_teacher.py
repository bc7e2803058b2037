"""A teacher without a network: each image's target is its row in a file of features.

The row of an image does not depend on its view.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from job.cluster.objects import allgather
from job.cluster.travels import travels
from job.data.images import Images
from job.distill.base import Distiller
from job.distill.feature_file import WRITE, Rows, read_companion, undecodable
from job.distill.options import DistillOptions
from job.distill.teacher import Teacher
from job.engine.run import Run
from job.errors import RunError, WorkerError
from job.evaluate.tables import companion, ending
from job.networks import UNDER_HEAD, Outline
from job.text import plural
from moco.copies import to_device


@travels
@dataclass(frozen=True)
class Found:
    """The rows of a run's images in a file.

    numbers: the row of each image, (images,) int64; -1: it is undecodable and has none. paths:
    the SHA-256 of all paths. shape: (n, T). about: what the features are, for the log. arch: of
    their network.
    """

    numbers: np.ndarray
    paths: str
    shape: tuple[int, int]
    about: str
    arch: str


def find_rows(path: str, images: Images) -> Found:
    """Find the rows of a run's images in a file, by their names.

    RunError: the file or its paths cannot be used, or images without a row.
    """
    if ending(path) != ".npy":
        problem = f"{ending(path)} cannot be read by rows; expected a file ending in .npy"
        raise RunError(f"--teacher {path}: {problem}. {WRITE}")
    rows, content = Rows(path), read_companion(path)
    paths = content["paths"]
    if len(paths) != rows.shape[0]:
        count = f"{plural(len(paths), 'path')} in {companion(path)}"
        problem = f"{plural(rows.shape[0], 'row')} and {count}; expected equal numbers"
        raise RunError(f"--teacher {path}: {problem}. {WRITE}")
    numbers = match(path, paths, undecodable(content), images)
    digest = hashlib.sha256("\0".join(paths).encode(errors="surrogatepass")).hexdigest()
    kind, arch = (str(content.get(name) or "") for name in ("features", "arch"))
    about = ", ".join(filter(None, (arch, kind)))
    return Found(numbers, digest, (rows.shape[0], rows.shape[1]), about, arch)


def match(path: str, paths: list[str], bad: set[str], images: Images) -> np.ndarray:
    """Return the row of each image, (images,) int64; -1: it is among the undecodable `bad`.

    The paths begin in the run's folder of images, or in the folder that it is in.
    RunError: images without a row, or two images of one name.
    """
    names = images.names.all()
    check_names(path, names, images)
    row_of = {name: number for number, name in enumerate(paths)}
    folder = f"{os.path.basename(os.path.abspath(images.root))}/"
    found = []
    for prefix in (folder, ""):
        rows = (row_of.get(prefix + name, -1) for name in names)
        numbers = np.fromiter(rows, np.int64, len(names))
        lacking = [int(i) for i in np.flatnonzero(numbers < 0) if prefix + names[i] not in bad]
        found.append((len(lacking), lacking, numbers))
    missing, lacking, numbers = min(found, key=lambda each: each[0])
    if missing:
        first = images.path(lacking[0])
        problem = f"no row for {missing} of {len(names)} images, such as {first}"
        expected = f"expected features of all images of {images.root}; the file has {paths[0]}"
        raise RunError(f"--teacher {path}: {problem}; {expected}. Run job.embed on that folder")
    return numbers


def check_names(path: str, names: list[str], images: Images) -> None:
    """RunError: two images have one name, as in two folders, so a row could be of either."""
    if len(set(names)) == len(names):
        return
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        other = images.path(first.setdefault(name, index))
        if other != (own := images.path(index)):  # a list can have a path twice
            problem = f"{other} and {own} have one name; expected different names"
            fix = "Name all images in a text file, for both programs"
            raise RunError(f"--teacher {path}: {problem}. {fix}")


@dataclass(frozen=True)
class FeatureTeacher(Teacher):
    """A teacher without a network. Its pooled features are rows of a file.

    numbers: the row of each image, as in Found.
    """

    rows: Rows = field(kw_only=True)
    images: Images = field(kw_only=True)
    numbers: np.ndarray = field(kw_only=True)

    def features(self, images: torch.Tensor, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the pooled features of the images `indices`, {"pooled": (b, T)}.

        A black image, which ends the run, has zeros. WorkerError: the disk fails, or an image has
        no row, because job.embed could not decode it.
        """
        numbers = self.rows_of(indices.numpy()).tolist()
        try:
            rows = torch.from_numpy(self.rows.read(numbers))  # (b, T)
        except RunError as error:
            raise WorkerError(str(error), error.code) from None
        return {UNDER_HEAD: to_device(rows, images.device)}

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the row of each image `indices`, (b,) int64; -1: a black one.

        WorkerError: an image has no row. Other workers have other images, and no error.
        """
        numbers = np.where(indices >= 0, self.numbers[indices], -1)
        without = indices[(numbers < 0) & (indices >= 0)]
        if len(without):
            image = self.images.path(int(without[0]))
            problem = f"no row for {image}, which job.embed could not decode"
            fix = "Run job.embed again, and start a new run"
            message = f"--teacher {self.rows.path}: {problem}; expected its features. {fix}"
            raise WorkerError(message, code=2)
        return numbers


def load_features(
    config: DistillOptions, kinds: Sequence[type[Distiller]], images: Images, run: Run
) -> Teacher:
    """Open the file of features --teacher for the run's images. A collective.

    RunError, on all workers: a distiller needs the teacher's head, the file cannot be used, images
    have no row, or a value is not finite.
    """
    path, start = config.teacher, time.perf_counter()
    for kind in kinds:
        if kind.needs_head(config):
            problem = f"--distill {kind.name}: needs the teacher's head, and {path} is a file of"
            fix = "Give that checkpoint, or use --distill simreg"
            raise RunError(f"{problem} features; expected a checkpoint with a head. {fix}")
    found = run.on_first(lambda: find_rows(path, images))
    rows = run.on_all(lambda: Rows(path))
    digests = check_rows(rows, found, images, run)
    n, T = found.shape
    seconds = time.perf_counter() - start
    about = f" ({found.about})" if found.about else ""
    run.log.record(
        "teacher",
        f"teacher {path}: {plural(n, 'row')} of {T} features{about}, without a network; each image"
        f" has the same targets in all views; reading and checking {seconds:.1f} s",
        arch=f"features of {found.arch}" if found.arch else "features",
        path=path,
    )
    content = f"{rows.dtype.str} {found.shape} {found.paths} {' '.join(digests)}"
    return FeatureTeacher(
        net=nn.Identity(),
        norms={},
        digest=hashlib.sha256(content.encode()).hexdigest()[:16],
        shown=f"features in {path}",
        outline=Outline(T),
        rows=rows,
        images=images,
        numbers=found.numbers,
    )


def check_rows(rows: Rows, found: Found, images: Images, run: Run) -> list[str]:
    """Return the SHA-256 of each block of rows, the same for any number of workers. A collective.

    RunError, on all workers: a value is not finite, or workers have files of different shapes, or
    with different values in a sample of rows.
    """
    checked = run.on_all(lambda: (*rows.check(run.rank, run.size), rows.sample()))
    every = allgather((*checked, list(rows.shape)), "feature_file")
    fix = "Use a shared file system, or the same copy on each node"
    for _, invalid, sample, shape in every:
        if tuple(shape) != found.shape:
            problem = f"{tuple(shape)} on another worker; expected {found.shape} on all"
            raise RunError(f"--teacher {rows.path}: {problem}. {fix}")
        if sample != every[0][2]:
            problem = "other values on another worker; expected the same on all"
            raise RunError(f"--teacher {rows.path}: {problem}. {fix}")
        if invalid >= 0:
            index = np.flatnonzero(found.numbers == invalid)[:1]
            of = "".join(f", of {images.path(int(each))}," for each in index)
            problem = f"row {invalid}{of} has values that are not finite; expected finite ones"
            raise RunError(f"--teacher {rows.path}: {problem}. Check the teacher. {WRITE}")
    digests = [""] * sum(len(own) for own, *_ in every)
    for rank, (own, *_) in enumerate(every):
        digests[rank :: run.size] = own
    return digests
